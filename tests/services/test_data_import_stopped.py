"""Imports that are stopped, killed or short of disk, and imports that meet: the next one goes on, and ends the same."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from lorasmith.errors import Conflict, DiskFull, Interrupted
from lorasmith.schemas.data import DataImportSpec, Dataset, Example, Fate
from lorasmith.services import data, data_curation, data_import
from lorasmith.services.data_digests import duplicate_digest
from lorasmith.services.data_import import import_dataset, only_import, work_place
from lorasmith.services.data_progress import Progress
from lorasmith.services.data_sources import find_dataset
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from tests.services.import_cases import SUPPORT, dataset_folders


class Stop:
    """Presses Ctrl-C when so many rows are read."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.phases: list[tuple[str, int]] = []

    def __call__(self, progress: Progress) -> None:
        self.phases.append((progress.phase, progress.rows))
        if progress.rows >= self.rows:
            raise KeyboardInterrupt


def write_many(path: Path, rows: int = 2500) -> Path:
    lines = (json.dumps({"input": f"question {n % 1800}", "output": f"answer {n}"}) + "\n" for n in range(rows))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def same_files(workbench: Workbench, first: Dataset, second: Dataset) -> bool:
    names = ("train.jsonl", "val.jsonl", "test.jsonl", "ledger.jsonl")
    folders = [workbench.path(dataset.folder) for dataset in (first, second)]
    return all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_an_import_that_was_stopped_goes_on_and_ends_as_if_it_had_not_been(
    workbench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(data_curation, "COMMIT_EVERY_S", 0)
    rows = [{"input": f"question {n % 1800}", "output": "" if n % 300 == 7 else "yes"} for n in range(2500)]
    path = tmp_path / name
    if name == "rows.json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif name == "rows.csv":
        path.write_text(
            "input,output\n" + "".join(f"{row['input']},{row['output']}\n" for row in rows), encoding="utf-8"
        )
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole = import_dataset(workbench, path, DataImportSpec(name="whole", max_rejected_share=0.1))
    for rows_before in (1000, 2000):
        with pytest.raises(Interrupted, match="no dataset 'parted' was made"):
            import_dataset(workbench, path, DataImportSpec(name="parted", max_rejected_share=0.1), Stop(rows_before))
    assert [dataset.name for dataset in data.list_datasets(workbench)] == ["whole"]
    seen = Stop(10**9)
    parted = import_dataset(workbench, path, DataImportSpec(name="parted", max_rejected_share=0.1), seen)
    assert seen.phases[0] == ("continuing", 1500)
    assert same_files(workbench, whole, parted)
    assert (parted.sha256, parted.fates, parted.statistics) == (whole.sha256, whole.fates, whole.statistics)
    assert dataset_folders(workbench) == sorted([whole.id, parted.id])


def test_ctrl_c_in_the_middle_of_a_row_is_no_error_of_the_row(
    workbench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_many(tmp_path / "rows.jsonl", 5)
    digests = 0

    def digest(example: Example) -> bytes:
        """As pydantic does, it makes an error of its own of what is raised within."""
        nonlocal digests
        digests += 1
        try:
            if digests == 3:
                signal.raise_signal(signal.SIGINT)
            return duplicate_digest(example)
        except KeyboardInterrupt as interrupt:
            raise ValueError(f"Error: {interrupt!r}") from interrupt

    monkeypatch.setattr(data_curation, "duplicate_digest", digest)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(Interrupted, match="stopped; no dataset 'rows' was made"):
            import_dataset(workbench, path, DataImportSpec(name="rows"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert digests == 3
    assert import_dataset(workbench, path, DataImportSpec(name="rows")).num_examples == 5


IMPORT_AND_END = """
import os, sys
from pathlib import Path
from lorasmith.schemas.data import DataImportSpec
from lorasmith.services import data_curation
from lorasmith.services.data_digests import duplicate_digest
from lorasmith.services.data_import import import_dataset
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings

home, source, signal = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
data_curation.COMMIT_EVERY_S = 0

def end(progress):
    if progress.rows >= 1000:
        os.kill(os.getpid(), signal)

import_dataset(Workbench.open(Settings(home=home)), source, DataImportSpec(name="rows"), end)
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_an_import_that_a_signal_ended_goes_on_where_it_had_come_to(
    workbench: Workbench, tmp_path: Path, ending: signal.Signals
) -> None:
    source = write_many(tmp_path / "rows.jsonl")
    arguments = [str(workbench.home), str(source), str(int(ending))]
    ended = subprocess.run([sys.executable, "-c", IMPORT_AND_END, *arguments], capture_output=True, check=False)
    assert ended.returncode == -ending, ended.stderr
    assert data.list_datasets(workbench) == []
    seen = Stop(10**9)
    resumed = import_dataset(workbench, source, DataImportSpec(name="rows"), seen)
    assert seen.phases[0] == ("continuing", 500)
    assert same_files(workbench, resumed, import_dataset(workbench, source, DataImportSpec(name="whole")))


@pytest.fixture
def small_home(small_disk: Path) -> Iterator[Workbench]:
    workbench = Workbench.open(Settings(home=small_disk / "home"))
    yield workbench
    workbench.datasets.engine.dispose()  # so that the file system below it can be taken away


def test_an_import_that_filled_the_disk_goes_on_when_there_is_room(
    small_disk: Path, small_home: Workbench, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_curation, "COMMIT_EVERY_S", 0)
    source = write_many(tmp_path_factory.mktemp("source") / "rows.jsonl", rows=6000)
    for _ in range(2):  # also where there still is no room
        with pytest.raises(DiskFull, match=r"the disk is full: writing below .* failed with") as caught:
            import_dataset(small_home, source, DataImportSpec(name="rows"))
        assert caught.value.hint == (
            "free some space, or choose another place with --home; the same command goes on where this one stopped"
        )
        assert dataset_folders(small_home) == [".staging-import-rows"]
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    seen = Stop(10**9)
    resumed = import_dataset(small_home, source, DataImportSpec(name="rows"), seen)
    assert seen.phases[0][0] == "continuing"
    assert seen.phases[0][1] >= 500
    assert same_files(small_home, resumed, import_dataset(small_home, source, DataImportSpec(name="whole")))
    assert len(dataset_folders(small_home)) == 2


class Fill:
    """Fills the disk as soon as the first rows are written to their parts."""

    def __init__(self, ballast: Path) -> None:
        self.ballast = ballast

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "writing" and not self.ballast.exists():
            with contextlib.suppress(OSError), self.ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)


def test_a_disk_that_fills_while_the_parts_are_written_costs_no_reading(
    small_disk: Path, small_home: Workbench, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = write_many(tmp_path_factory.mktemp("source") / "rows.jsonl")
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    with pytest.raises(DiskFull):
        import_dataset(small_home, source, DataImportSpec(name="rows"), Fill(small_disk / "ballast"))
    (small_disk / "ballast").unlink()
    seen = Stop(10**9)
    assert import_dataset(small_home, source, DataImportSpec(name="rows"), seen).num_examples == 2500
    assert {phase for phase, _ in seen.phases} == {"writing"}


def test_a_fault_of_the_program_costs_no_reading(workbench: Workbench, tmp_path: Path) -> None:
    def break_down(progress: Progress) -> None:
        if progress.phase == "writing":
            raise RuntimeError("a fault")

    source = write_many(tmp_path / "rows.jsonl")
    with pytest.raises(RuntimeError):
        import_dataset(workbench, source, DataImportSpec(name="rows"), break_down)
    seen = Stop(10**9)
    assert import_dataset(workbench, source, DataImportSpec(name="rows"), seen).num_examples == 2500
    assert {phase for phase, _ in seen.phases} == {"writing"}


def test_what_another_file_left_behind_is_not_continued(workbench: Workbench, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"text": "old {n}"}}\n' for n in range(600)), encoding="utf-8")
    with pytest.raises(Interrupted):
        import_dataset(workbench, path, DataImportSpec(name="rows"), Stop(500))
    path.write_text('{"text": "new"}\n', encoding="utf-8")
    dataset = import_dataset(workbench, path, DataImportSpec(name="rows"))
    assert dataset.num_examples == 1
    assert dataset_folders(workbench) == [dataset.id]


def test_two_imports_of_one_name_do_not_meet(workbench: Workbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_import, "WAIT_S", 0.0)
    folder = work_place(workbench.path("datasets"), "support")
    with only_import(folder), pytest.raises(Conflict, match="another process is importing"):
        import_dataset(workbench, SUPPORT, DataImportSpec(name="support"))
    assert import_dataset(workbench, SUPPORT, DataImportSpec(name="support")).num_examples == 12


def test_an_import_that_waits_for_the_same_one_gets_its_dataset(workbench: Workbench) -> None:
    with ThreadPoolExecutor() as pool:
        second: list[Future[Dataset]] = []

        def begin_another(progress: Progress) -> None:
            if not second:
                second.append(pool.submit(import_dataset, workbench, SUPPORT, DataImportSpec(name="support")))
                time.sleep(0.3)  # until it waits

        made = import_dataset(workbench, SUPPORT, DataImportSpec(name="support"), begin_another)
        assert second[0].result() == made
    assert dataset_folders(workbench) == [made.id]


def test_a_built_in_dataset_that_two_name_first_is_imported_once(workbench: Workbench) -> None:
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(partial(find_dataset, workbench), ["interactions"] * 4))
    assert {one.id for one in found} == {workbench.datasets.require("interactions").id}


@pytest.mark.parametrize("phase", ["comparing", "writing"])
def test_an_import_that_was_stopped_behind_its_near_duplicates_ends_as_if_it_had_not_been(
    workbench: Workbench, tmp_path: Path, phase: str
) -> None:
    source = tmp_path / "rows.jsonl"
    stories = [" ".join(f"word{number}x{n}" for n in range(40)) for number in range(300)]
    rows = [{"input": f"{story[:9]}?", "output": story + more} for story in stories for more in ("", " more")]
    rows = [{**row, "group": f"{n % 100}"} for n, row in enumerate(rows)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = DataImportSpec(name="rows", near_duplicates=0.8)

    def stop(progress: Progress) -> None:
        if progress.phase == phase:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        import_dataset(workbench, source, spec, stop)
    resumed = import_dataset(workbench, source, spec)
    whole = import_dataset(workbench, source, spec.model_copy(update={"name": "whole"}))
    assert resumed.fates == {Fate.KEPT: 300, Fate.EXACT_DUPLICATE: 0, Fate.NEAR_DUPLICATE: 300, Fate.REJECTED: 0}
    assert same_files(workbench, resumed, whole)
