"""What one job, the database or the disk raises ends neither the worker nor the jobs beside it."""

from __future__ import annotations

import fcntl
import logging
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lorasmith.errors import NotFound
from lorasmith.files import append_lines, write_json
from lorasmith.jobs import leases
from lorasmith.jobs.leases import LeaseKeeper, holder
from lorasmith.jobs.processes import LOCK
from lorasmith.schemas.jobs import Event, Job, JobKind, JobStatus, now
from lorasmith.services import worker as worker_module
from lorasmith.services.jobs import create_job, list_jobs, queue_again, run_in_foreground
from lorasmith.services.workbench import Workbench
from lorasmith.services.worker import TRIES, Worker
from lorasmith.settings import Settings
from lorasmith.store import database
from lorasmith.store import jobs as queue
from tests.waiting import until

GONE = "elsewhere:1:1"


@pytest.fixture
def worker(workbench: Workbench) -> Worker:
    return Worker(workbench, 1, lambda job, text: None)


def left(workbench: Workbench, kind: JobKind = JobKind.EXPORT) -> Job:
    """A job that a worker had begun, which is gone."""
    create_job(workbench, kind, "left", {}, {}, cores=1)
    claimed = workbench.jobs.claim(GONE, 4)
    assert claimed is not None
    workbench.jobs.release(claimed[1])
    return claimed[0]


@contextmanager
def engine_in(folder: Path) -> Iterator[None]:
    """What an engine holds as long as it runs."""
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def look(worker: Worker) -> None:
    """One look at which everything is due."""
    worker.next_claim = worker.next_adoption = worker.next_disk_look = 0.0
    for running in worker.running:
        running.wait_until = 0.0
    worker.look()


def status_of(workbench: Workbench, job: Job) -> tuple[JobStatus, str | None]:
    found = workbench.jobs.require(job.id)
    return found.status, found.reason


def test_a_folder_that_cannot_be_read_fails_alone(workbench: Workbench, worker: Worker) -> None:
    broken, sound = left(workbench), left(workbench)
    write_json(workbench.path(broken.folder) / "error.json", {"reason_code": 5})
    write_json(workbench.path(sound.folder) / "error.json", {"reason_code": "oom", "message": "no memory"})
    look(worker)
    assert status_of(workbench, sound) == (JobStatus.FAILED, "no memory")
    assert status_of(workbench, broken)[0] is JobStatus.RUNNING
    for _ in range(TRIES - 1):
        look(worker)
    status, reason = status_of(workbench, broken)
    assert status is JobStatus.FAILED
    assert str(reason).startswith("what came of it cannot be stored: 2 validation errors for JobError")
    assert worker.running == []


def test_a_list_shows_the_jobs_beside_one_that_cannot_be_read(workbench: Workbench) -> None:
    broken, sound = left(workbench), left(workbench)
    write_json(workbench.path(broken.folder) / "error.json", [])
    write_json(workbench.path(sound.folder) / "error.json", {"reason_code": "oom", "message": "no memory"})
    assert [job.status for job in list_jobs(workbench)] == [JobStatus.RUNNING, JobStatus.FAILED]


def test_an_event_that_says_nothing_does_not_end_the_others(workbench: Workbench, worker: Worker) -> None:
    odd, sound = left(workbench), left(workbench)
    with engine_in(workbench.path(odd.folder)), engine_in(workbench.path(sound.folder)):
        look(worker)
        event = Event(seq=1, time=now(), type="warning")
        append_lines(workbench.path(odd.folder) / "events.jsonl", [event.model_dump_json()])
        write_json(workbench.path(sound.folder) / "result.json", {})
    look(worker)
    assert status_of(workbench, sound)[0] is JobStatus.COMPLETED
    look(worker)
    assert status_of(workbench, odd)[0] is JobStatus.QUEUED, "its engine has ended without a word"


@contextmanager
def without_jobs(workbench: Workbench) -> Iterator[None]:
    """Every statement about jobs is an `OperationalError`."""
    with closing(sqlite3.connect(workbench.home / database.DATABASE_NAME, isolation_level=None)) as connection:
        connection.execute("ALTER TABLE jobs RENAME TO away")
        try:
            yield
        finally:
            connection.execute("ALTER TABLE away RENAME TO jobs")


def test_a_worker_outlives_a_broken_database(
    workbench: Workbench, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_module, "AGAIN_S", 0.05)
    monkeypatch.setattr(worker_module, "LOOK_S", 0.01)
    job, stop = left(workbench), threading.Event()
    write_json(workbench.path(job.folder) / "result.json", {})
    thread = threading.Thread(target=worker.run, args=(stop.wait,))
    with without_jobs(workbench):
        thread.start()
        until(lambda: "no such table: jobs" in caplog.text)
    until(lambda: status_of(workbench, job)[0] is JobStatus.COMPLETED)
    stop.set()
    thread.join()


def test_leases_are_renewed_after_a_broken_database(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leases, "RENEW_S", 0.01)
    create_job(workbench, JobKind.EXPORT, "held", {}, {})
    claimed = workbench.jobs.claim(holder(), 1)
    assert claimed is not None
    with LeaseKeeper(workbench.jobs, claimed[1]) as keeper:
        with without_jobs(workbench):
            until(lambda: "leases could not be renewed" in caplog.text)
        taken = workbench.jobs.take(claimed[0].id, holder(), {JobStatus.RUNNING})  # the next renewal will see it
        until(lambda: keeper.lost == {claimed[1]})
    assert taken[1].token == claimed[1].token + 1


def test_a_phase_that_a_busy_database_did_not_take_is_heard_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_MS", 20)
    workbench = Workbench.open(Settings(home=tmp_path / "home"))
    worker, job = Worker(workbench, 1, lambda job, text: None), left(workbench, JobKind.TRAINING)
    with engine_in(workbench.path(job.folder)):
        look(worker)
        event = Event(seq=1, time=now(), type="phase", data={"name": "train"})
        append_lines(workbench.path(job.folder) / "events.jsonl", [event.model_dump_json()])
        with closing(sqlite3.connect(workbench.home / database.DATABASE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            look(worker)
            assert status_of(workbench, job)[0] is JobStatus.PREPARING
        look(worker)
        assert status_of(workbench, job)[0] is JobStatus.TRAINING


def test_a_job_whose_engine_runs_already_is_adopted_and_not_failed(
    workbench: Workbench, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(queue, "LEASE_S", 0.0)
    job = create_job(workbench, JobKind.EXPORT, "running", {}, {})
    with engine_in(workbench.path(job.folder)):
        look(worker)
        assert "an engine process runs in" in caplog.text
        assert status_of(workbench, job) == (JobStatus.RUNNING, None)
        assert not (workbench.path(job.folder) / "error.json").exists()
        look(worker)
        assert [running.job.id for running in worker.running] == [job.id]
        write_json(workbench.path(job.folder) / "result.json", {})
    look(worker)
    assert status_of(workbench, job)[0] is JobStatus.COMPLETED


def test_a_job_that_cannot_start_has_failed_and_the_next_one_is_tried(
    workbench: Workbench, worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = [create_job(workbench, JobKind.EXPORT, "broken", {}, {}) for _ in range(2)]
    for job in jobs:
        (workbench.path(job.folder) / "log.txt").mkdir()
    with caplog.at_level(logging.ERROR):
        look(worker)
    for job in jobs:
        status, reason = status_of(workbench, job)
        assert (status, "it did not start: [Errno 21] Is a directory" in str(reason)) == (JobStatus.FAILED, True)
        assert f"{job.id} did not start" in caplog.text


def test_a_job_whose_folder_is_gone_has_failed_and_says_so(workbench: Workbench, worker: Worker) -> None:
    removed, sound = left(workbench), left(workbench)
    waiting = create_job(workbench, JobKind.TRAINING, "waits", {}, {})
    for job in (removed, waiting):
        shutil.rmtree(workbench.path(job.folder))
    write_json(workbench.path(sound.folder) / "error.json", {"reason_code": "oom", "message": "no memory"})
    for _ in range(2):
        look(worker)
    assert status_of(workbench, sound) == (JobStatus.FAILED, "no memory")
    for job in (removed, waiting):
        folder = workbench.path(job.folder)
        assert status_of(workbench, job) == (JobStatus.FAILED, f"the job's folder {folder} is gone")
        assert not folder.exists()
    assert worker.running == []
    with pytest.raises(NotFound, match=f"the job's folder {workbench.path(waiting.folder)} is gone") as told:
        queue_again(workbench, waiting)
    assert told.value.hint == "put it back and resume the job, or begin another one"
    with pytest.raises(NotFound, match="is gone"):
        run_in_foreground(workbench, waiting, lambda event: None)
    assert status_of(workbench, waiting)[0] is JobStatus.FAILED
