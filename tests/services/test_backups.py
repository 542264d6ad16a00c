"""Copies of the database, and databases of other versions."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from lorasmith.errors import Conflict, DamagedDatabase
from lorasmith.services.recovery import recover
from lorasmith.settings import Settings
from lorasmith.store.database import HEAD_REVISION, connect, current_revision
from lorasmith.store.database_file import BACKUPS, KEPT_BACKUPS, back_up, backups
from tests.services.damage import opened, overwrite, small_home


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return small_home(tmp_path / "home")


def test_a_full_disk_may_be_read_without_the_copy_of_the_day(small_disk: Path) -> None:
    home = small_disk / "home"
    opened(home).models.engine.dispose()
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 60_000))
    workbench = opened(home)
    assert workbench.models.list() == []
    workbench.models.engine.dispose()
    assert backups(home) == []


def test_backups_are_made_once_a_day_and_of_whole_databases_alone(small: Path) -> None:
    opened(small).models.engine.dispose()
    (first,) = backups(small)
    opened(small).models.engine.dispose()
    assert backups(small) == [first]
    for _ in range(KEPT_BACKUPS + 1):
        newest = back_up(small / "lorasmith.db")
    assert backups(small)[0] == newest
    assert len(backups(small)) == KEPT_BACKUPS
    kept = backups(small)
    overwrite("jobs")(small / "lorasmith.db")
    with pytest.raises(DamagedDatabase):
        back_up(small / "lorasmith.db")
    assert backups(small) == kept
    assert list((small / BACKUPS).glob("*.tmp")) == []


KILLED_MIGRATION = """
import os, signal, sys
from pathlib import Path
from alembic import op
from lorasmith.store.database import open_database
op.create_index = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
open_database(Path(sys.argv[1]))
"""


def test_a_migration_that_is_killed_leaves_the_old_database_and_a_copy_of_it(small: Path) -> None:
    downgrade(small)
    before = jobs_of(small / "lorasmith.db")
    ran = subprocess.run([sys.executable, "-c", KILLED_MIGRATION, str(small)], check=False, capture_output=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    (copy,) = backups(small)
    assert jobs_of(copy) == before
    assert jobs_of(small / "lorasmith.db") == before
    assert current_revision(connect(small)) == "0001"
    assert len(opened(small).jobs.list()) == len(before)
    assert current_revision(connect(small)) == HEAD_REVISION


def downgrade(home: Path) -> None:
    """To the first revision, as an older lorasmith left it."""
    from alembic import command
    from alembic.config import Config

    import lorasmith.store.database as database

    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    engine = connect(home)
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
    engine.dispose()


def jobs_of(database: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT id, document FROM jobs ORDER BY id").fetchall()


def test_a_database_of_a_newer_version_is_refused_and_left_alone(small: Path) -> None:
    with closing(sqlite3.connect(small / "lorasmith.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Conflict, match=r"lorasmith.db was written by a newer lorasmith: .*9999") as raised:
        opened(small)
    assert raised.value.hint == "pip install -U lorasmith"
    with pytest.raises(Conflict, match="newer lorasmith"):
        recover(Settings(home=small))
    assert not (small / "damaged").exists()
