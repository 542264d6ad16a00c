from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from lorasmith.errors import Conflict, DiskFull, LorasmithError, NotFound
from lorasmith.schemas.models import BaseModelEntry
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from lorasmith.store.database import HEAD_REVISION, Base, current_revision, open_database, reading
from tests.conftest import read_only


def entry(name: str) -> BaseModelEntry:
    return BaseModelEntry(id=f"model_{name}", name=name, source="hub", location=f"org/{name}")


def test_a_row_is_found_by_name_and_by_id(workbench: Workbench) -> None:
    workbench.models.add(entry("llama"))
    assert workbench.models.require("llama") == workbench.models.require("model_llama")


def test_a_taken_name_is_refused(workbench: Workbench) -> None:
    workbench.models.add(entry("llama"))
    other = entry("llama").model_copy(update={"id": "model_2"})
    with pytest.raises(Conflict, match="there is already a model named 'llama'"):
        workbench.models.add(other)


def test_a_missing_row_names_the_nearest(workbench: Workbench) -> None:
    workbench.models.add(entry("llama"))
    with pytest.raises(NotFound, match="no model 'lama'; did you mean 'llama'") as raised:
        workbench.models.require("lama")
    assert raised.value.hint == "known models: llama"


def test_as_many_threads_as_there_are_read_at_once(workbench: Workbench) -> None:
    together = Barrier(40, timeout=20)  # as many as a server has for its requests

    def read(_: int) -> int:
        with reading(workbench.models.engine) as session:
            session.connection()
            together.wait()
            return workbench.models.count()

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(read, range(40))) == [0] * 40


def test_rows_survive_a_second_opening(workbench: Workbench) -> None:
    workbench.models.add(entry("llama"))
    assert [row.name for row in Workbench.open(Settings(home=workbench.home)).models.list()] == ["llama"]


def test_replacing_a_removed_row_says_so(workbench: Workbench) -> None:
    workbench.models.add(entry("llama"))
    workbench.models.remove("model_llama")
    with pytest.raises(NotFound, match="has been removed"):
        workbench.models.replace(entry("llama"))


def test_the_migrations_make_the_tables_that_the_code_declares(workbench: Workbench) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = open_database(workbench.home)
    assert current_revision(engine) == HEAD_REVISION
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []


def test_rows_that_are_saved_together_are_stored_together_or_not_at_all(workbench: Workbench) -> None:
    workbench.models.add(entry("llama"))
    old = entry("llama").model_copy(update={"name": "llama@1"})
    new = entry("llama").model_copy(update={"id": "model_2"})
    workbench.models.save(old, new)
    assert [(row.id, row.name) for row in workbench.models.list()] == [("model_2", "llama"), ("model_llama", "llama@1")]
    third = entry("llama").model_copy(update={"id": "model_3"})
    with pytest.raises(Conflict, match="there is already a model named 'llama'") as raised:
        workbench.models.save(old.model_copy(update={"name": "llama@2"}), third)
    assert raised.value.hint == "another process made it: try again"
    assert workbench.models.require("model_llama").name == "llama@1"


def test_a_row_that_does_not_fit_is_a_full_disk(small_disk: Path) -> None:
    workbench = Workbench.open(Settings(home=small_disk / "home"))
    try:
        with pytest.raises(DiskFull, match=r"the disk is full: writing below .* failed with"):
            workbench.models.add(entry("llama").model_copy(update={"location": "x" * 2_000_000}))
        assert workbench.models.list() == []
    finally:
        workbench.models.engine.dispose()  # so that the file system below it can be taken away


def test_a_home_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with read_only(home), pytest.raises(LorasmithError, match=f"the home folder {home} cannot be read and written: "):
        Workbench.open(Settings(home=home))
    (tmp_path / "file").touch()
    with pytest.raises(LorasmithError, match="/file cannot be read and written: File exists"):
        Workbench.open(Settings(home=tmp_path / "file"))
