"""The process that serves: a socket that is bound before anything is promised, and an end that waits for requests."""

from __future__ import annotations

import contextlib
import errno
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from lorasmith.api.app import create_app
from lorasmith.api.event_streams import OpenStreams
from lorasmith.errors import Conflict, InvalidSpec, NotFound
from lorasmith.services.server_lock import only_server
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings

PORTS_TRIED = 20
STOP_S = 10  # that requests get to end


class Server(uvicorn.Server):
    """Ends with status 0 on SIGTERM and Ctrl-C, which is how a server is meant to end, and its streams with it."""

    def __init__(self, config: uvicorn.Config, streams: OpenStreams) -> None:
        super().__init__(config)
        self.streams = streams

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.streams.end()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(workbench: Workbench, settings: ServerSettings, *, next_port: bool, listening: Callable[[str], None]) -> None:
    """Serve until a signal comes; `listening` is called with the address once connections are taken.

    Raises `Conflict` when another server has this home, or the port is taken and `next_port` is false, and `InvalidSpec` for
    a certificate that cannot be used.
    """
    if settings.tls_cert is not None and settings.tls_key is not None:
        check_certificate(settings.tls_cert, settings.tls_key)
    with only_server(workbench.home) as lock, bound(settings, next_port) as listener:
        url = url_of(settings, listener.getsockname()[1])
        lock.say(url)
        app = create_app(workbench, settings)
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            proxy_headers=False,  # else a caller could choose the address that its wrong passwords count for
            server_header=False,
            timeout_graceful_shutdown=STOP_S,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
        listening(url)
        Server(config, app.state.streams).run(sockets=[listener])


@contextlib.contextmanager
def bound(settings: ServerSettings, next_port: bool) -> Iterator[socket.socket]:
    """A listening socket on the port, or with `next_port` on the first free one of the ports from there on."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    ports = range(settings.port, settings.port + PORTS_TRIED) if next_port and settings.port else [settings.port]
    for port in ports:
        # asyncio turns Nagle off only where the socket names its protocol; with it each answer waits 40 ms for an acknowledgement
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, port))
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRINUSE:
                continue
            raise InvalidSpec(
                f"cannot listen on {settings.host} port {port}: {error.strerror}", hint="another --host or --port"
            ) from None
        with listener:
            listener.listen(128)
            yield listener
        return
    what = f"port {ports[0]} is taken" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]} are taken"
    raise Conflict(what, hint="give another --port, or --port 0 for any that is free")


def check_certificate(certificate: Path, key: Path) -> None:
    def no_password() -> str:
        raise InvalidSpec(
            f"the key {key} is encrypted, and nobody is here to give its password",
            hint="openssl pkey -in KEY -out PLAIN",
        )

    for path in (certificate, key):
        if not path.is_file():
            raise NotFound(f"no file {path}", hint="--tls-cert and --tls-key name PEM files")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, no_password)
    except (ssl.SSLError, OSError) as error:
        raise InvalidSpec(
            f"the certificate {certificate} and the key {key} cannot be used: {error}",
            hint="both are PEM, and the key is that of the certificate",
        ) from error


def url_of(settings: ServerSettings, port: int) -> str:
    scheme = "https" if settings.tls_cert else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{port}"
