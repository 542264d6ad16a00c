"""Who calls: the token of the home folder, or a session that a login began."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from argon2 import PasswordHasher
from argon2.exceptions import VerifyMismatchError
from starlette.requests import HTTPConnection

from lorasmith.errors import TooManyAttempts
from lorasmith.files import sha256_bytes
from lorasmith.services.access import api_token, same_secret, token_file

SESSION_COOKIE = "lorasmith_session"
SESSION_S = 12 * 3600.0
MOST_SESSIONS = 1000
CHANGE_HEADER = "x-lorasmith-request"  # a page of another site cannot send it without asking first
READING = ("GET", "HEAD", "OPTIONS")

Caller = Literal["token", "session"]
Clock = Callable[[], float]


class Token:
    """The home's token, read again when its file has changed."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path = token_file(home)
        self.stamp = self.file_stamp()  # before the value: of a token that is changed between, it is not the stamp
        self.value = api_token(home)

    def file_stamp(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_ino

    def matches(self, given: str) -> bool:
        stamp = self.file_stamp()
        if stamp is None:
            return False  # removed: nobody comes in until it is there again
        if stamp != self.stamp:
            self.value, self.stamp = api_token(self.home), stamp
        return same_secret(given, self.value)


class Sessions:
    """Logins in memory: a restart of the server ends them. Only digests are kept."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.ends: dict[str, float] = {}
        self.lock = threading.Lock()

    def begin(self) -> str:
        session = secrets.token_urlsafe(32)
        with self.lock:
            now = self.clock()
            self.ends = {digest: end for digest, end in self.ends.items() if end > now}
            while len(self.ends) >= MOST_SESSIONS:
                self.ends.pop(next(iter(self.ends)))
            self.ends[sha256_bytes(session.encode())] = now + SESSION_S
        return session

    def holds(self, session: str) -> bool:
        return self.ends.get(sha256_bytes(session.encode()), 0.0) > self.clock()

    def end(self, session: str) -> None:
        with self.lock:
            self.ends.pop(sha256_bytes(session.encode()), None)


class Attempts:
    """At most `most` failures within `window_s` of one caller, and ten times as many of all."""

    def __init__(self, most: int, window_s: float, clock: Clock = time.monotonic) -> None:
        self.most = most
        self.window_s = window_s
        self.clock = clock
        self.failures: dict[str, deque[float]] = {}
        self.lock = threading.Lock()

    def check(self, address: str) -> None:
        """Raise `TooManyAttempts` where no further one is looked at."""
        with self.lock:
            now = self.clock()
            for known in list(self.failures):
                times = self.failures[known]
                while times and times[0] <= now - self.window_s:
                    times.popleft()
                if not times:
                    del self.failures[known]
            own = self.failures.get(address, ())
            if len(own) >= self.most or sum(map(len, self.failures.values())) >= 10 * self.most:
                oldest = own[0] if own else now
                wait = max(1, int(oldest + self.window_s - now) + 1)
                raise TooManyAttempts("too many wrong passwords or tokens", retry_after_s=wait, hint=f"wait {wait} s")

    def note_failure(self, address: str) -> None:
        with self.lock:
            self.failures.setdefault(address, deque()).append(self.clock())


def bearer_token(connection: HTTPConnection) -> str | None:
    """Of `Authorization: Bearer …`; an empty string for a header of another form or several of them."""
    headers = connection.headers.getlist("authorization")
    if not headers:
        return None
    scheme, _, value = headers[0].partition(" ")
    return value.strip() if len(headers) == 1 and scheme.lower() == "bearer" else ""


class Credentials:
    """The one place that reads them from a request. A token in the query or in another header is none."""

    def __init__(self, home: Path) -> None:
        self.token = Token(home)
        self.sessions = Sessions()

    def caller(self, connection: HTTPConnection) -> Caller | None:
        """How the caller proved itself. A bearer header decides alone; a session changes things only with `CHANGE_HEADER`."""
        bearer = bearer_token(connection)
        if bearer is not None:
            return "token" if self.token.matches(bearer) else None
        session = connection.cookies.get(SESSION_COOKIE)
        if session is None or not self.sessions.holds(session):
            return None
        changes = connection.scope["type"] == "http" and connection.scope["method"] not in READING
        return None if changes and CHANGE_HEADER not in connection.headers else "session"

    def were_given(self, connection: HTTPConnection) -> bool:
        return "authorization" in connection.headers or SESSION_COOKIE in connection.cookies


class Password:
    """What a login is compared with; only its argon2 hash is kept. Without one no password is right."""

    def __init__(self, password: str | None) -> None:
        self.hasher = PasswordHasher()
        self.hash = None if password is None else self.hasher.hash(password)

    def matches(self, given: str) -> bool:
        """Takes some 50 ms on purpose."""
        if self.hash is None:
            return False
        try:
            return self.hasher.verify(self.hash, given)
        except VerifyMismatchError:
            return False
