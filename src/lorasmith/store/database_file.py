"""The database as a file: whether it is whole, the copies that are kept of it, and what can still be read of a damaged one."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from lorasmith.errors import DamagedDatabase
from lorasmith.files import disk_errors, fsync_folder

DATABASE_NAME = "lorasmith.db"
BACKUPS = "backups"
KEPT_BACKUPS = 3
BACKUP_EVERY_S = 24 * 3600.0
BESIDE = ("-wal", "-shm", "-journal")  # that SQLite puts beside a database
DAMAGES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
SHOWN_PROBLEMS = 10


def damaged(path: Path, what: object) -> DamagedDatabase:
    return DamagedDatabase(
        f"the database {path} is damaged: {what}",
        hint=f"lorasmith --home {path.parent} recover keeps the file aside and makes the index again, from what can be read, the newest backup and the folders",
    )


def is_damage(error: BaseException | None) -> bool:
    """Whether an error of SQLite says that the file is not a whole database; its lowest byte is the kind."""
    return isinstance(error, sqlite3.DatabaseError) and (getattr(error, "sqlite_errorcode", 0) & 0xFF) in DAMAGES


def problems(path: Path) -> list[str]:
    """What SQLite finds wrong in a database, reading all of it; an empty list where it is whole."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=10)) as connection:
            found = [str(row[0]) for row in connection.execute(f"PRAGMA integrity_check({SHOWN_PROBLEMS})")]
            loose = [
                f"{row[0]} row {row[1]} names no {row[2]}" for row in connection.execute("PRAGMA foreign_key_check")
            ]
            if not connection.execute("SELECT name FROM sqlite_master WHERE name = 'alembic_version'").fetchall():
                loose.append("it is empty")
    except sqlite3.Error as error:
        return [str(error)]
    return [problem for problem in [*found, *loose[:SHOWN_PROBLEMS]] if problem != "ok"]


def backups(home: Path) -> list[Path]:
    """The newest first."""
    return sorted((home / BACKUPS).glob("*.db"), reverse=True)


def backup_due(home: Path) -> bool:
    newest = backups(home)
    return not newest or time.time() - newest[0].stat().st_mtime > BACKUP_EVERY_S


def back_up(database: Path) -> Path:
    """Copy the database while others use it, and remove old copies; one process at a time. Raises `DamagedDatabase` where it is not whole: the copies stay."""
    folder = database.parent / BACKUPS
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        for stale in folder.glob("*.tmp"):  # of a process that was killed
            stale.unlink(missing_ok=True)
        target = folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}.db"
        temporary = target.with_suffix(".tmp")
        try:
            with closing(sqlite3.connect(database, timeout=10)) as source, closing(sqlite3.connect(temporary)) as copy:
                source.backup(copy)
            found = problems(temporary)
            if found:
                raise damaged(database, found[0])
            temporary.replace(target)
        except sqlite3.DatabaseError as error:
            if is_damage(error):
                raise damaged(database, error) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(folder)
    for old in backups(database.parent)[KEPT_BACKUPS:]:
        old.unlink(missing_ok=True)
    return target


def set_aside(database: Path) -> Path:
    """Move a database and what belongs to it into a folder of its own."""
    folder = database.parent / "damaged" / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}"
    with disk_errors(folder):
        folder.mkdir(parents=True)
        for suffix in (*BESIDE, ""):  # the database last: what is left behind by a crash belongs to it
            path = database.with_name(database.name + suffix)
            if path.exists():
                path.rename(folder / path.name)
        fsync_folder(database.parent)
    return folder


def readable_rows(database: Path, tables: tuple[str, ...], scratch: Path) -> Iterator[tuple[str, str]]:
    """(table, document) of each row that can still be read, from a copy below `scratch`: reading changes a database."""
    copy = scratch / database.name
    for suffix in ("", "-wal"):
        path = database.with_name(database.name + suffix)
        if path.is_file():
            shutil.copyfile(path, copy.with_name(copy.name + suffix))
    if not copy.is_file():
        return
    with closing(sqlite3.connect(copy)) as connection:
        connection.text_factory = bytes  # a damaged text may be none
        for table in tables:
            seen = set()
            for order in ("ASC", "DESC"):  # from both sides of a damaged page
                try:
                    for (document,) in connection.execute(f"SELECT document FROM {table} ORDER BY rowid {order}"):
                        if document not in seen:
                            seen.add(document)
                            yield table, document.decode("utf-8", errors="replace")
                except (sqlite3.Error, AttributeError, OverflowError):  # AttributeError: a value that is no text
                    continue
