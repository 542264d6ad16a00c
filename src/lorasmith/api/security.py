"""The door of the server, before any route: Host, Origin, body size and credentials of every request.

Pure ASGI, so that no route, mount or error page can be reached around it. What is not named in `PUBLIC` needs a
credential, also what does not exist.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorasmith.api.credentials import CHANGE_HEADER, Attempts, Credentials
from lorasmith.api.problems import error_response, unknown_error_response
from lorasmith.errors import Forbidden, LorasmithError, TooLarge, Unauthorized
from lorasmith.settings import ServerSettings

LOGIN_PATH = "/api/v1/login"
PUBLIC = {("GET", "/healthz"), ("GET", "/readyz"), ("POST", LOGIN_PATH)}
LARGE_BODIES = re.compile(r"/api/v1/finetune/(datasets|uploads/[^/]+)|/v1/files")  # whose POST or PATCH is a file
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
ANY_ADDRESS = ("0.0.0.0", "::")
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Door:
    """Lets a request through to `app`, or answers it with a problem."""

    def __init__(
        self, app: ASGIApp, settings: ServerSettings, credentials: Credentials, attempts: Attempts, home: Path
    ) -> None:
        self.app = app
        self.settings = settings
        self.credentials = credentials
        self.home = home
        self.attempts = attempts
        names = {*LOOPBACK_NAMES, *settings.allowed_hosts}
        if settings.host in ANY_ADDRESS:
            names.add(socket.gethostname())
        else:
            names.add(settings.host)
        self.host_names = {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self.websocket(scope, receive, send)
            return
        send = with_headers(send)
        try:
            self.check(scope)
            receive = self.limited(scope, receive)
        except LorasmithError as error:
            await error_response(error, self.home, scope["path"])(scope, receive, send)
            return
        began = False

        async def noting(message: Message) -> None:
            nonlocal began
            began = began or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, noting)
        except Exception:
            if not began:
                await unknown_error_response(scope["path"])(scope, receive, send)
            raise  # to the server's log

    async def websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.check(scope)
        except LorasmithError as error:
            await send({"type": "websocket.close", "code": 1008, "reason": error.code})  # 403 before the upgrade
            return
        await self.app(scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Raise `Forbidden` or `Unauthorized` for a request that may not come in."""
        connection = HTTPConnection(scope)
        self.check_host(connection)
        self.check_origin(connection)
        if scope["type"] == "http" and (scope["method"], scope["path"]) in PUBLIC:
            return
        caller = self.credentials.caller(connection)
        if caller is not None:
            scope.setdefault("state", {})["caller"] = caller
            return
        if self.credentials.were_given(connection):
            self.refuse_wrong(connection)
        raise Unauthorized(
            "this needs a token or a session", hint="Authorization: Bearer TOKEN; `lorasmith api-token` prints it"
        )

    def refuse_wrong(self, connection: HTTPConnection) -> None:
        """Only wrong credentials are limited: the right ones get in beside somebody who guesses, from the same address too."""
        address = connection.client.host if connection.client else "unknown"
        self.attempts.check(address)
        self.attempts.note_failure(address)
        raise Unauthorized(
            "the token or session is wrong or has ended",
            hint=f"`lorasmith api-token` prints the token; a session's changes also need the header {CHANGE_HEADER}",
        )

    def check_host(self, connection: HTTPConnection) -> None:
        """Against DNS rebinding: the Host header must name this server, whatever its port."""
        given = connection.headers.getlist("host")
        name = host_name(given[0]) if len(given) == 1 else None
        if name is None or not self.is_own_name(name):
            raise Forbidden(
                f"the Host header says {given[0][:100]!r}, which is not this server"
                if given
                else "there is no Host header",
                hint="LORASMITH_ALLOWED_HOSTS=name,… lets further names in",
            )

    def is_own_name(self, name: str) -> bool:
        if name in self.host_names:
            return True
        return self.settings.host in ANY_ADDRESS and is_address(name)  # an address cannot be rebound

    def check_origin(self, connection: HTTPConnection) -> None:
        """Pages of other sites may not call, on any method; programs send neither header."""
        hint = "open the page of this server, or LORASMITH_ALLOWED_ORIGINS=https://name,…"
        for origin in connection.headers.getlist("origin"):
            own = urlsplit(origin).netloc.lower() == connection.headers["host"].lower() and origin.startswith("http")
            if not own and origin not in self.settings.allowed_origins:
                raise Forbidden(f"a page of {origin[:100]!r} may not call this server", hint=hint)
        for site in connection.headers.getlist("sec-fetch-site"):
            known = connection.headers.get("origin") in self.settings.allowed_origins
            if site not in ("same-origin", "none") and not known:
                raise Forbidden(
                    f"a page of another site may not call this server (Sec-Fetch-Site: {site[:40]!r})", hint=hint
                )

    def limited(self, scope: Scope, receive: Receive) -> Receive:
        """Raise `TooLarge` for a length that is announced, and stop a body that passes its limit unannounced."""
        large = scope["method"] in ("POST", "PATCH") and LARGE_BODIES.fullmatch(scope["path"])
        most = self.settings.max_upload_bytes if large else self.settings.max_body_bytes
        announced = HTTPConnection(scope).headers.get("content-length", "")
        if announced.isdigit() and int(announced) > most:
            raise TooLarge(*too_large(most, int(announced)))
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > most:
                raise HTTPException(413, too_large(most, None)[0])
            return message

        return counted


def too_large(most: int, announced: int | None) -> tuple[str]:
    what = f"the body has {announced} bytes" if announced is not None else "the body is longer"
    return (f"{what}, and this takes at most {most}",)


def host_name(header: str) -> str | None:
    """`localhost` of `localhost:8420`, `::1` of `[::1]:8420`; None where the header is no host."""
    match = re.fullmatch(r"(?:\[(?P<six>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::\d{1,5})?", header)
    return (match["six"] or match["name"]).lower().rstrip(".") if match else None


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def with_headers(send: Send) -> Send:
    """Add what every answer says to browsers."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("Cache-Control", "no-store")
        await send(message)

    return sending
