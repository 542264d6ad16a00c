"""Home folders for tests of damaged, old and copied databases, and damage to them."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from lorasmith.schemas.jobs import JobKind
from lorasmith.services.jobs import create_job
from lorasmith.services.models import add_model
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from lorasmith.store.database_file import BACKUPS

Damage = Callable[[Path], Any]


def opened(home: Path) -> Workbench:
    return Workbench.open(Settings(home=home))


def small_home(home: Path) -> Path:
    """A job and a model, and no backup."""
    workbench = opened(home)
    create_job(workbench, JobKind.TRAINING, "waiting", {}, {"adapter_name": "waiting"}, auto_resume=True)
    add_model(workbench, "org/tiny", "tiny")
    workbench.models.engine.dispose()
    shutil.rmtree(home / BACKUPS, ignore_errors=True)
    return home


def overwrite(name: str) -> Damage:
    """The first page of a table or an index."""

    def damage(database: Path) -> None:
        with closing(sqlite3.connect(database)) as connection:
            ((page, size),) = connection.execute(
                "SELECT rootpage, (SELECT page_size FROM pragma_page_size) FROM sqlite_master WHERE name = ?", [name]
            )
        with database.open("r+b") as file:
            file.seek((page - 1) * size)
            file.write(b"\xa5" * size)

    return damage
