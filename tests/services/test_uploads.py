"""Uploads whose import the machine holds up: what was sent is kept, and tried again."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import Conflict
from lorasmith.files import read_json_if_there
from lorasmith.schemas.data import DataImportSpec
from lorasmith.schemas.uploads import DatasetStatus, Upload
from lorasmith.services import upload_imports, uploads
from lorasmith.services.data_import import only_import, work_place
from lorasmith.services.upload_imports import Importer
from lorasmith.services.uploads import (
    begin_upload,
    find_upload,
    finish_upload,
    import_upload,
    list_uploads,
    remove_upload,
)
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from lorasmith.store.database import DATABASE_NAME
from tests.conftest import mounted

ROWS = "".join(f'{{"instruction": "Add 1 to {n}.", "output": "{n + 1}"}}\n' for n in range(200))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_imports, "AGAIN_S", 0.1)


def uploaded(workbench: Workbench) -> Upload:
    upload = begin_upload(workbench, "rows.jsonl", None, DataImportSpec(name="sums"))
    workbench.path(upload.content).write_text(ROWS, encoding="utf-8")
    return finish_upload(workbench, upload)


@contextmanager
def importing(workbench: Workbench) -> Iterator[None]:
    importer = Importer(workbench)
    importer.begin()
    try:
        yield
    finally:
        importer.stop()
        assert not importer.thread.is_alive()


def until(workbench: Workbench, upload: Upload, reached: Callable[[Upload], bool]) -> Upload:
    ends = time.monotonic() + 60
    while (found := find_upload(workbench, upload.id)) is None or not reached(found):
        assert time.monotonic() < ends, found
        time.sleep(0.02)
    return found


def fill(folder: Path) -> Path:
    """A file that takes what is free but for two pages."""
    path = folder / "filler"
    with path.open("wb") as file:
        disk = os.statvfs(folder)
        os.posix_fallocate(file.fileno(), 0, (disk.f_bavail - 2) * disk.f_frsize)
    return path


@pytest.fixture
def small_home(tmp_path: Path) -> Iterator[Workbench]:
    home = tmp_path / "home"
    home.mkdir()
    with mounted(home, megabytes=104):  # four more than an upload leaves free
        workbench = Workbench.open(Settings(home=home))
        yield workbench
        workbench.jobs.engine.dispose()


def test_an_upload_waits_while_the_disk_is_full(small_home: Workbench) -> None:
    upload = uploaded(small_home)
    filler = fill(small_home.home)
    with importing(small_home):
        waiting = until(small_home, upload, lambda found: found.problem is not None)
        assert waiting.status is DatasetStatus.PROCESSING
        assert str(waiting.problem).startswith("it is tried again: the disk is full: writing below ")
        assert small_home.path(upload.content).read_text(encoding="utf-8") == ROWS
        filler.unlink()
        ready = until(small_home, upload, lambda found: found.status is DatasetStatus.READY)
    assert ready.problem is None
    assert small_home.datasets.require("sums").num_examples == 200


def test_an_upload_that_waits_for_room_can_be_removed(small_home: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload_imports, "AGAIN_S", 600.0)
    upload = uploaded(small_home)
    with pytest.raises(Conflict, match="'sums' is being imported"):
        remove_upload(small_home, upload)
    fill(small_home.home)
    with importing(small_home):
        remove_upload(small_home, until(small_home, upload, lambda found: found.problem is not None))
    assert list(small_home.path("uploads").iterdir()) == []
    assert list(small_home.path("datasets").iterdir()) == []


def test_an_upload_waits_for_another_import_of_its_name_and_leaves_that_alone(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_imports, "AGAIN_S", 600.0)
    upload = uploaded(workbench)
    folder = work_place(workbench.path("datasets"), "sums")
    with only_import(folder), importing(workbench):
        waiting = until(workbench, upload, lambda found: found.problem is not None)
        assert str(waiting.problem).startswith("it is tried again: another process is importing under this name")
        remove_upload(workbench, waiting)
        assert folder.exists()
    assert find_upload(workbench, upload.id) is None


def test_an_unknown_error_keeps_the_file_for_the_next_server(
    workbench: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    upload = uploaded(workbench)
    with closing(sqlite3.connect(workbench.home / DATABASE_NAME, isolation_level=None)) as connection:
        connection.execute("ALTER TABLE datasets RENAME TO away")
        with importing(workbench):
            failed = until(workbench, upload, lambda found: found.status is DatasetStatus.ERROR)
        connection.execute("ALTER TABLE away RENAME TO datasets")
    assert "an error that lorasmith does not know" in str(failed.problem)
    assert "no such table: datasets" in caplog.text
    with importing(workbench):
        until(workbench, upload, lambda found: found.status is DatasetStatus.READY)


def test_a_missing_model_is_not_the_files_fault(workbench: Workbench) -> None:
    upload = uploaded(workbench)
    upload.spec.tokenizer = "gone"
    state = workbench.path(upload.folder) / "upload.json"
    state.write_text(upload.model_dump_json(), encoding="utf-8")
    with importing(workbench):
        failed = until(workbench, upload, lambda found: found.status is DatasetStatus.ERROR)
    assert "'gone'" in str(failed.problem)
    assert workbench.path(upload.content).exists()
    remove_upload(workbench, failed)
    assert find_upload(workbench, upload.id) is None


def test_an_import_that_ends_between_the_look_and_the_read_is_found(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = [uploaded(workbench)]

    def ends_first(path: Path) -> Any:
        while ending:
            import_upload(workbench, ending.pop(), lambda: False)
        return read_json_if_there(path)

    monkeypatch.setattr(uploads, "read_json_if_there", ends_first)
    upload_id = ending[0].id
    found = find_upload(workbench, upload_id)
    assert found is not None
    assert found.status is DatasetStatus.READY

    ending.append(begin_upload(workbench, "more.jsonl", None, DataImportSpec(name="more")))
    workbench.path(ending[0].content).write_text(ROWS, encoding="utf-8")
    finish_upload(workbench, ending[0])
    assert list_uploads(workbench) == []
