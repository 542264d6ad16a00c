"""What an import must remember of all rows before: their digests, their groups and where it stands, on disk.

One SQLite file beside the rows that are being written. Everything up to the last `commit` is consistent with the state
that was stored in it, so that an import that was killed goes on from there.
"""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any

from lorasmith.errors import Conflict
from lorasmith.schemas.data import Part

CACHE_KIB = 64 * 1024  # of pages in memory; the rest stays on the disk, about 60 bytes a row
TABLES = """
CREATE TABLE IF NOT EXISTS seen (digest BLOB PRIMARY KEY, row INTEGER, example_id BLOB) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (
    name TEXT PRIMARY KEY, position REAL, rows INTEGER, pinned TEXT, spread INTEGER, part TEXT
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS joined (name TEXT PRIMARY KEY, into_group TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS state (id INTEGER PRIMARY KEY CHECK (id = 1), value TEXT);
"""
ADD_GROUP = """
INSERT INTO groups (name, position, rows, pinned, spread) VALUES (?, ?, 1, ?, 0)
ON CONFLICT (name) DO UPDATE SET
    rows = rows + 1,
    spread = spread OR (pinned IS NOT NULL AND excluded.pinned IS NOT NULL AND pinned <> excluded.pinned),
    pinned = coalesce(pinned, excluded.pinned)
"""


class Busy(Conflict):
    """Another process works on the same import."""


class ImportIndex:
    """`path` None keeps it in memory. Raises `Busy` while another process has the file open."""

    def __init__(self, path: Path | None = None) -> None:
        self.connection = sqlite3.connect(str(path) if path else ":memory:", isolation_level=None, timeout=1.0)
        try:
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
            self.connection.execute("BEGIN EXCLUSIVE")
            for statement in TABLES.strip().split(";\n"):
                self.connection.execute(statement)
        except sqlite3.OperationalError as error:
            self.connection.close()
            if "locked" not in str(error):
                raise
            raise Busy("another process is importing under this name", hint="wait for it, or stop it") from None

    def __enter__(self) -> ImportIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.connection.close()

    def state(self) -> dict[str, Any] | None:
        found = self.connection.execute("SELECT value FROM state").fetchone()
        return json.loads(found[0]) if found else None

    def commit(self, state: dict[str, Any]) -> None:
        """Keep everything up to here, with the state that belongs to it."""
        self.connection.execute("INSERT OR REPLACE INTO state VALUES (1, ?)", (json.dumps(state),))
        self.connection.execute("COMMIT")
        self.connection.execute("BEGIN EXCLUSIVE")

    def clear(self) -> None:
        for table in ("seen", "groups", "joined", "state"):
            self.connection.execute(f"DELETE FROM {table}")

    def clear_groups(self) -> None:
        for table in ("groups", "joined"):
            self.connection.execute(f"DELETE FROM {table}")

    def first_with(self, digest: bytes, row: int, example_id: str) -> tuple[int, str] | None:
        """(row, example id) of the earlier row with this digest; None for the first one, which is noted."""
        added = self.connection.execute(
            "INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", (digest, row, bytes.fromhex(example_id))
        )
        if added.rowcount:
            return None
        found = self.connection.execute("SELECT row, example_id FROM seen WHERE digest = ?", (digest,)).fetchone()
        return found[0], found[1].hex()

    def add_to_group(self, name: str, position: float, pinned: Part | None) -> None:
        self.connection.execute(ADD_GROUP, (name, position, pinned))

    def join(self, name: str, into_group: str) -> None:
        """Rows of the group `name` are split as rows of the other one, in which they are to be counted."""
        self.connection.execute("INSERT OR IGNORE INTO joined VALUES (?, ?)", (name, into_group))

    def joined_group(self, name: str) -> str:
        found = self.connection.execute("SELECT into_group FROM joined WHERE name = ?", (name,)).fetchone()
        return found[0] if found else name

    def part_of(self, group: str) -> Part:
        found = self.connection.execute("SELECT part FROM groups WHERE name = ?", (group,)).fetchone()
        part: Part = found[0]
        return part
