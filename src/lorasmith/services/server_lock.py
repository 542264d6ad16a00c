"""One server for a home folder: a file that the server holds locked, and that says where it listens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lorasmith.errors import Conflict
from lorasmith.files import try_lock
from lorasmith.services.access import server_folder

LOCK = "running.json"


class ServerLock:
    """Held until the process ends, whatever ends it: a lock of the system, so that none is ever left behind."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def say(self, url: str) -> None:
        self.file.seek(0)
        self.file.truncate()
        json.dump({"pid": os.getpid(), "url": url}, self.file)
        self.file.flush()


@contextmanager
def only_server(home: Path) -> Iterator[ServerLock]:
    """Raises `Conflict` with process and address of the server that is there already."""
    path = server_folder(home) / LOCK
    with path.open("a+", encoding="utf-8") as file:
        if not try_lock(file.fileno()):
            file.seek(0)
            raise Conflict(
                f"another server works on {home}: {described(file.read())}",
                hint="use that one, stop it first, or give this one another --home",
            )
        lock = ServerLock(file)
        lock.say("starting")
        yield lock
        file.seek(0)
        file.truncate()


def described(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']}, {found['url']}"
    except (ValueError, KeyError, TypeError):
        return "it is starting"
