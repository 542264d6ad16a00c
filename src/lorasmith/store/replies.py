"""What was answered to requests with an `Idempotency-Key`: a file of its own, which may be removed without loss of facts."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

KEPT_S = 24 * 3600.0
TABLE = """
CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, digest TEXT NOT NULL, begun REAL NOT NULL, status INTEGER, headers TEXT, body BLOB
)
"""


@dataclass(frozen=True)
class Reply:
    """`digest` is that of the request; `status` None: it is still being answered."""

    digest: str
    status: int | None
    headers: dict[str, str]
    body: bytes


class Replies:
    """Keys count for `KEPT_S`. A key is taken by the first request that comes with it, in one statement."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self.clock = clock
        with self.connection() as connection:
            connection.execute(TABLE)
            connection.execute("DELETE FROM replies WHERE status IS NULL")  # of a server that ended before its answer

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=10)) as connection, connection:
            yield connection

    def take(self, key: str, digest: str) -> Reply | None:
        """None when the key was free and is now this request's; else what the key stands for."""
        now = self.clock()
        with self.connection() as connection:
            connection.execute("DELETE FROM replies WHERE begun <= ?", (now - KEPT_S,))
            added = connection.execute(
                "INSERT OR IGNORE INTO replies (key, digest, begun) VALUES (?, ?, ?)", (key, digest, now)
            )
            if added.rowcount:
                return None
            found = connection.execute(
                "SELECT digest, status, headers, body FROM replies WHERE key = ?", (key,)
            ).fetchone()
        return Reply(found[0], found[1], json.loads(found[2] or "{}"), found[3] or b"")

    def keep(self, key: str, status: int, headers: dict[str, str], body: bytes) -> None:
        with self.connection() as connection:
            connection.execute(
                "UPDATE replies SET status = ?, headers = ?, body = ? WHERE key = ?",
                (status, json.dumps(headers), body, key),
            )

    def free(self, key: str) -> None:
        """The request failed: the same key may be sent again."""
        with self.connection() as connection:
            connection.execute("DELETE FROM replies WHERE key = ? AND status IS NULL", (key,))
