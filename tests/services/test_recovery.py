"""A home folder whose database is damaged in each way that disks, crashes and people damage files."""

from __future__ import annotations

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import Conflict, DamagedDatabase
from lorasmith.files import write_json
from lorasmith.schemas.evaluation import Evaluation
from lorasmith.schemas.jobs import JobKind, JobStatus, now
from lorasmith.schemas.training import TrainingSpec
from lorasmith.services.adapters import verify_adapter
from lorasmith.services.doctor import examine
from lorasmith.services.job_outcomes import keep_evaluation
from lorasmith.services.jobs import create_job
from lorasmith.services.models import add_model
from lorasmith.services.recovery import job_of, recover
from lorasmith.services.server_lock import only_server
from lorasmith.services.training import start_training, train
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from lorasmith.store.database_file import BACKUPS, back_up, problems
from tests.services.damage import Damage, opened, overwrite, small_home

TABLES = ("datasets", "adapters", "evaluations", "jobs", "models")
Rows = dict[str, list[dict[str, Any]]]


def all_rows(home: Path) -> Rows:
    workbench = opened(home)
    try:
        return {table: [row.model_dump() for row in getattr(workbench, table).list()] for table in TABLES}
    finally:
        workbench.models.engine.dispose()


def names(rows: Rows) -> dict[str, list[str]]:
    return {table: [row["name"] for row in found] for table, found in rows.items()}


@pytest.fixture(scope="module")
def lived_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of a dataset, an adapter that was trained, an evaluation, jobs in three states, a model, and no backup."""
    home = tmp_path_factory.mktemp("lived") / "home"
    workbench = opened(home)
    file = home.parent / "rows.csv"
    file.write_text("input,output\n" + "".join(f"{n} + 1?,{n + 1}\n" for n in range(20)), encoding="utf-8")
    settings = {"precision": "fp32", "memory": "lean", "max_steps": 1, "max_seq_length": 128, "batch_size": 2}
    spec = {"model": "starter", "data": str(file), "name": "adder", "lora": {"rank": 2}, "training": settings}
    train(
        workbench, start_training(workbench, TrainingSpec.model_validate(spec), auto_resume=False), lambda event: None
    )
    start_training(workbench, TrainingSpec.model_validate({**spec, "name": "waiting"}))
    failed = create_job(workbench, JobKind.TRAINING, "failing", {}, {"adapter_name": "failing"}, auto_resume=True)
    write_json(home / failed.folder / "error.json", {"reason_code": "oom", "message": "the machine ran out of memory"})
    (dataset,) = workbench.datasets.list()
    made = home / failed.folder / "evaluation"
    evaluation = Evaluation.model_validate(
        {
            "id": "evaluation_1",
            "name": "adder",
            "adapter": "adder",
            "model": "starter",
            "dataset": dataset.name,
            "part": "test",
            "conditions": [],
            "comparisons": [],
            "peak_memory_bytes": 1,
            "settings": {},
            "folder": "evaluation",
        }
    )
    made.mkdir()
    (made / "evaluation.json").write_text(evaluation.model_dump_json())
    keep_evaluation(workbench, failed, evaluation)
    add_model(workbench, "org/tiny", "tiny")
    workbench.models.engine.dispose()
    shutil.rmtree(home / BACKUPS, ignore_errors=True)
    return home


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return small_home(tmp_path / "home")


@pytest.fixture
def home(lived_in: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lived_in, tmp_path / "home"))


def overwrite_header(database: Path) -> None:
    with database.open("r+b") as file:
        file.write(b"\xa5" * 4096)


def rewrite_documents(database: Path) -> None:
    """What a page that was mixed up inside a text looks like: SQLite finds nothing wrong."""
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("UPDATE adapters SET document = substr(document, 5)")


DAMAGES: dict[str, Damage] = {
    "removed": lambda database: database.unlink(),
    "empty": lambda database: database.write_bytes(b""),
    "not a database": lambda database: database.write_bytes(b"no database at all, " * 999),
    "first page": overwrite_header,
    "cut in half": lambda database: database.write_bytes(database.read_bytes()[: database.stat().st_size // 2]),
    "cut in the header": lambda database: database.write_bytes(database.read_bytes()[:50]),
    "a page of jobs": overwrite("jobs"),
    "a page of adapters": overwrite("adapters"),
    "an index": overwrite("ix_jobs_status"),
}
UNNOTICED = {"an index"}  # until it is read, or the doctor looks


def test_a_file_that_is_no_database_is_kept_and_its_backup_is_used(small: Path) -> None:
    back_up(small / "lorasmith.db")
    before = all_rows(small)
    DAMAGES["not a database"](small / "lorasmith.db")
    with pytest.raises(DamagedDatabase, match="is damaged: file is not a database"):
        all_rows(small)
    recovery = recover(Settings(home=small))
    assert recovery.from_backup == {"jobs": 1, "models": 1}
    assert all_rows(small) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("backed_up", [False, True])
def test_a_damaged_database_is_named_kept_and_made_again(name: str, backed_up: bool, home: Path) -> None:
    before = all_rows(home)
    shutil.rmtree(home / BACKUPS)
    if backed_up:
        back_up(home / "lorasmith.db")
    else:
        (home / BACKUPS).mkdir()
        (home / BACKUPS / "20000101-000000-000000.db").write_bytes(b"a backup that is damaged, too")
    for rest in ("lorasmith.db-wal", "lorasmith.db-shm"):
        (home / rest).unlink(missing_ok=True)
    DAMAGES[name](home / "lorasmith.db")
    bytes_before = (home / "lorasmith.db").read_bytes() if (home / "lorasmith.db").exists() else None

    found = next(finding for finding in examine(home) if finding.what == "database")
    assert (found.state, found.way_out) == ("broken", f"lorasmith --home {home} recover")
    if name not in UNNOTICED:
        with pytest.raises(DamagedDatabase, match=f"the database {home}/lorasmith.db is damaged") as raised:
            all_rows(home)
        assert "recover keeps the file aside" in str(raised.value.hint)

    recovery = recover(Settings(home=home))
    assert recovery.problems
    assert recovery.kept_aside is not None
    aside = Path(recovery.kept_aside) / "lorasmith.db"
    if bytes_before:
        assert aside.read_bytes() == bytes_before
    after = all_rows(home)
    kept = {table: sorted(found) for table, found in names(before).items()}
    now = {table: sorted(found) for table, found in names(after).items()}
    if backed_up:
        assert now == kept
        assert {row["id"] for row in after["jobs"]} == {row["id"] for row in before["jobs"]}
    else:
        assert now["datasets"] == kept["datasets"]
        assert now["adapters"] == kept["adapters"]
        assert len(now["jobs"]) == len(kept["jobs"])
        assert len(now["evaluations"]) == len(kept["evaluations"])
    verify_adapter(opened(home), "adder")
    assert problems(home / "lorasmith.db") == []
    assert next(finding for finding in examine(home) if finding.what == "database").state == "ok"


@pytest.mark.slow
def test_rows_are_rebuilt_from_folders_as_they_were(home: Path) -> None:
    before = all_rows(home)
    shutil.rmtree(home / BACKUPS)
    (home / "lorasmith.db").unlink()
    recovery = recover(Settings(home=home))
    assert recovery.from_folders == {"jobs": 3, "datasets": 1, "adapters": 1, "evaluations": 1}
    after = all_rows(home)
    assert after["datasets"] == before["datasets"]
    assert after["evaluations"] == before["evaluations"]
    (was,), (now,) = before["adapters"], after["adapters"]
    assert {key for key in was if was[key] != now[key]} <= {"created_at", "metrics"}
    assert now["metrics"]["validation_loss"] == was["metrics"]["validation_loss"]
    by_name = {row["name"]: row for row in after["jobs"]}
    trained = next(row for row in before["jobs"] if row["status"] is JobStatus.COMPLETED)
    assert by_name["adder"]["status"] is JobStatus.COMPLETED
    assert by_name["adder"]["adapter_id"] == trained["adapter_id"]
    assert by_name["adder"]["result"] == trained["result"]
    assert (by_name["waiting"]["status"], by_name["waiting"]["auto_resume"]) == (JobStatus.INTERRUPTED, False)
    assert (by_name["failing"]["status"], by_name["failing"]["reason_code"]) == (JobStatus.FAILED, "oom")


@pytest.mark.slow
def test_texts_that_changed_inside_a_whole_database_are_made_again(home: Path) -> None:
    before = all_rows(home)
    rewrite_documents(home / "lorasmith.db")
    assert problems(home / "lorasmith.db") == []
    recovery = recover(Settings(home=home))
    assert recovery.kept_aside is not None
    assert names(all_rows(home)) == names(before)


def test_a_lost_wal_leaves_folders_without_rows_which_get_theirs(small: Path) -> None:
    """What stood in the log alone is gone, and nothing in the file says so."""
    workbench = opened(small)
    known = len(workbench.jobs.list())
    with closing(sqlite3.connect(small / "lorasmith.db")) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        reader = sqlite3.connect(small / "lorasmith.db")  # whose snapshot keeps the log from being folded in
        reader.execute("BEGIN").execute("SELECT count(*) FROM jobs").fetchall()
        create_job(workbench, JobKind.TRAINING, "late", {}, {"adapter_name": "late"}, auto_resume=True)
        lost = small.parent / "lost"
        shutil.copytree(small, lost)
        reader.close()
    (lost / "lorasmith.db-wal").unlink()
    (lost / "lorasmith.db-shm").unlink(missing_ok=True)
    assert len(opened(lost).jobs.list()) == known
    recovery = recover(Settings(home=lost))
    assert (recovery.kept_aside, recovery.from_folders) == (None, {"jobs": 1})
    assert "late" in names(all_rows(lost))["jobs"]


def test_a_whole_database_stays_as_it_is(small: Path) -> None:
    before = all_rows(small)
    recovery = recover(Settings(home=small))
    assert (recovery.problems, recovery.kept_aside, recovery.from_folders) == ([], None, {})
    assert all_rows(small) == before


@pytest.mark.slow
def test_a_folder_that_does_not_say_what_it_is_stays_and_is_named(home: Path) -> None:
    (home / "adapters" / "adapter_0").mkdir()
    (home / "adapters" / "adapter_0" / "passport.json").write_text("{}")
    recovery = recover(Settings(home=home))
    assert any("adapter_0" in left for left in recovery.left_out)
    assert (home / "adapters" / "adapter_0").exists()


KILLED_RECOVERY = """
import os, signal, sys
from pathlib import Path
import lorasmith.services.recovery as recovery
from lorasmith.settings import Settings
setattr(recovery, sys.argv[2], lambda *paths: os.kill(os.getpid(), signal.SIGKILL))
recovery.recover(Settings(home=Path(sys.argv[1])))
"""


@pytest.mark.parametrize("step", ["rebuild", "keep_aside", "put_in_place"])
def test_a_recovery_that_is_killed_loses_nothing(step: str, small: Path) -> None:
    before = all_rows(small)
    shutil.rmtree(small / BACKUPS, ignore_errors=True)
    overwrite("ix_jobs_status")(small / "lorasmith.db")
    command = [sys.executable, "-c", KILLED_RECOVERY, str(small), step]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    recovery = recover(Settings(home=small))
    assert recovery.from_database == {"jobs": 1, "models": 1}
    assert all_rows(small) == before
    assert list(small.glob(".staging-*")) == []


def test_nothing_is_made_again_beside_a_server(small: Path) -> None:
    with only_server(small), pytest.raises(Conflict, match="another server works on"):
        recover(Settings(home=small))


@pytest.mark.slow
def test_the_command_says_what_it_found(lorasmith: Any, home: Path) -> None:
    assert home.name == "home"  # which is the home of the command, too
    (home / "lorasmith.db").write_bytes(b"no database at all, " * 999)
    refused = lorasmith("data", "list")
    assert (refused.returncode, "is damaged: file is not a database" in refused.stderr) == (1, True)
    assert lorasmith("doctor").returncode == 1
    ran = lorasmith("recover", "--json")
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["from_folders"] == {"jobs": 3, "datasets": 1, "adapters": 1, "evaluations": 1}
    assert Path(said["kept_aside"], "lorasmith.db").exists()
    assert "adder" in lorasmith("adapters", "list").stdout


def test_a_job_is_read_from_its_folder_where_events_are_broken(workbench: Workbench) -> None:
    job = create_job(workbench, JobKind.EVALUATION, "adder", {}, {})
    folder, time = workbench.path(job.folder), now()
    event = json.dumps({"seq": 2, "time": time.isoformat(), "type": "note", "data": {}})
    (folder / "events.jsonl").write_text(f'{{"seq": 1, "ti{event}\n{event}\n{{"seq": 3{event}\n', encoding="utf-8")
    found = job_of(workbench, folder)
    assert (found.id, found.started_at, found.completed_at) == (job.id, time, time)
