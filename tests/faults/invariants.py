"""What holds of a home folder after a kill, and what holds once everything has been done again."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lorasmith.cli.app import app
from lorasmith.files import sha256_file, verify_manifest
from lorasmith.jobs.folder import read_error, read_result
from lorasmith.jobs.processes import engine_runs, process_started
from lorasmith.schemas.jobs import ACTIVE, Job, JobKind, JobStatus
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings


def rows(home: Path) -> Workbench:
    return Workbench.open(Settings(home=home))


def whole_at_any_time(home: Path) -> None:
    """I2 and I6: right after a kill, whatever is visible is whole, and each row has its files."""
    if not (home / "lorasmith.db").exists():
        return
    database_is_sound(home)
    for folder in visible(home):
        verify_manifest(folder)
    workbench = rows(home)
    for row in (*workbench.datasets.list(), *workbench.adapters.list()):
        assert (workbench.path(row.folder) / "manifest.json").is_file(), f"{row.id} has no files"
    for job in workbench.jobs.list():
        assert (workbench.path(job.folder) / "job.json").is_file(), f"{job.id} has no order"


def visible(home: Path) -> list[Path]:
    """Folders under the names of results."""
    names = ("datasets/*", "adapters/*", "exports/*/*", "jobs/*/adapter", "jobs/*/checkpoints/step-*")
    names += ("jobs/*/best/step-*", "tokens/*/*")
    found = (path for name in names for path in home.glob(name) if path.is_dir())
    return [path for path in found if not path.name.startswith(".staging-") and path.suffix != ".partial"]


def database_is_sound(home: Path) -> None:
    """I6"""
    connection = sqlite3.connect(home / "lorasmith.db")
    try:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    finally:
        connection.close()


def all_is_done(home: Path) -> None:
    """I1 to I6 and I8, after the last session."""
    whole_at_any_time(home)
    workbench = rows(home)
    jobs = workbench.jobs.list()
    assert [job.kind for job in jobs] == [JobKind.TRAINING, JobKind.EXPORT]
    for job in jobs:
        folder = workbench.path(job.folder)
        assert job.status is JobStatus.COMPLETED, f"{job.id} is {job.status}: {job.reason}"  # I1
        assert not ACTIVE & {job.status}
        holder = workbench.jobs.lease_of(job.id)[1]  # of a process that was killed between the row and its lease
        assert holder is None or process_started(int(holder.split(":")[1])) is None, (
            f"I1: {holder} still answers for it"
        )
        assert (job.pid, job.request) == (None, None)
        numbered_without_gap(folder)
        assert not engine_runs(folder), "I4: an engine still runs there"
        assert read_error(folder) is None, "I8: the folder says that it has failed"
        assert read_result(folder) == job.result, "I8"
        shown_as_stored(home, job)
    nothing_is_left(workbench)


def numbered_without_gap(folder: Path) -> None:
    """I3"""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines), "I3: a torn line"
    numbers = [json.loads(line)["seq"] for line in lines]
    assert numbers == list(range(1, len(numbers) + 1)), f"I3: {numbers}"


def nothing_is_left(workbench: Workbench) -> None:
    """I5, and no folder without its row."""
    left = [path for path in workbench.home.rglob("*") if path.name.startswith(".staging-") or path.suffix == ".tmp"]
    assert left == [], f"I5: {left}"
    for kind, table in (("datasets", workbench.datasets), ("adapters", workbench.adapters)):
        folders = {path.name for path in (workbench.home / kind).iterdir()}
        assert folders == {Path(row.folder).name for row in table.list()}, f"I2: {kind} without a row"
    assert len(list(workbench.home.glob("exports/*/*"))) == 1, "I2: an export that no job names"


def shown_as_stored(home: Path, job: Job) -> None:
    """I8: the command says what the row says."""
    shown = CliRunner().invoke(app, ["--home", str(home), "jobs", "show", job.id])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout) == job.model_dump(mode="json")


def outcome(home: Path) -> dict[str, Any]:
    """What must be the same, bit for bit, whatever was killed on the way (I7)."""
    workbench = rows(home)
    (dataset,), (adapter,) = workbench.datasets.list(), workbench.adapters.list()
    (exported,) = home.glob("exports/*/*/model.safetensors")
    training = workbench.jobs.list()[0]
    checkpoint = max((workbench.path(training.folder) / "checkpoints").glob("step-*"))
    assert training.result is not None
    return {
        "dataset": dataset.sha256,
        "adapter": sha256_file(workbench.path(adapter.folder) / "adapter_model.safetensors"),
        "export": sha256_file(exported),
        "optimizer": sha256_file(checkpoint / "state.safetensors"),
        **{key: training.result[key] for key in ("training_loss", "validation_loss", "adapter_step", "trained_tokens")},
    }
