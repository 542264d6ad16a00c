"""Workers, as processes of their own, with real engines: queue, kill, adopt, go on, cancel."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorasmith.errors import Conflict, JobFailed
from lorasmith.files import read_json
from lorasmith.jobs.folder import newest_checkpoint_name, read_request
from lorasmith.jobs.processes import engine_runs, start_engine
from lorasmith.schemas.jobs import ACTIVE, Job, JobRequest, JobStatus
from lorasmith.schemas.training import TrainingSpec
from lorasmith.services import jobs
from lorasmith.services.jobs import ask, job_events, queue_again, run_in_foreground
from lorasmith.services.training import start_training
from lorasmith.services.workbench import Workbench
from lorasmith.services.worker import Worker
from tests.conftest import mounted

Queues = Callable[..., Job]


@pytest.fixture
def queued(workbench: Workbench, tmp_path: Path) -> Queues:
    """Queue a training run; `epochs` says how long it takes (a step is a tenth of a second or so)."""
    file = tmp_path / "rows.csv"
    lines = [f"{n}?,{' '.join(str(n + more) for more in range(60))}\n" for n in range(10)]
    file.write_text("input,output\n" + "".join(lines), encoding="utf-8")

    def make(name: str, epochs: int = 1, **facts: object) -> Job:
        settings = {"precision": "fp32", "memory": "lean", "batch_size": 4, "gradient_accumulation_steps": 1}
        settings |= {"num_epochs": epochs, "log_every": 1, "save_every": 2}
        spec = {"model": "starter", "data": str(file), "name": name, "lora": {"rank": 4}, "training": settings}
        return start_training(workbench, TrainingSpec.model_validate(spec), **facts)

    return make


@pytest.fixture
def worker(workbench: Workbench) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Start a worker of the home; what it leaves running is killed at the end of the test."""
    workers: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "lorasmith", "--home", str(workbench.home), "worker"]
        workers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        return workers[-1]

    yield start
    for process in workers:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()
    for job in workbench.jobs.list():
        if job.pid and engine_runs(workbench.path(job.folder)):
            os.kill(job.pid, signal.SIGKILL)


def until(workbench: Workbench, job: Job, reached: Callable[[Job], bool], seconds: float = 120) -> Job:
    deadline = time.monotonic() + seconds
    while not reached(found := workbench.jobs.require(job.id)):
        assert time.monotonic() < deadline, f"{found.status}: {found.reason}"
        time.sleep(0.1)
    return found


def has(*statuses: JobStatus) -> Callable[[Job], bool]:
    return lambda job: job.status in statuses


def saved(workbench: Workbench) -> Callable[[Job], bool]:
    """Whether a job runs and has a checkpoint."""
    return lambda job: job.pid is not None and bool(newest_checkpoint_name(workbench.path(job.folder)))


def starts(workbench: Workbench, job: Job) -> int:
    return (workbench.path(job.folder) / "events.jsonl").read_text(encoding="utf-8").count('"type": "started"')


@pytest.mark.slow
def test_queued_jobs_run_by_priority_and_leave_their_adapters(
    workbench: Workbench, queued: Queues, worker: Callable[[], subprocess.Popen[bytes]]
) -> None:
    first, second = queued("later"), queued("sooner", priority=1)
    cancelled = ask(workbench, queued("never"), JobRequest.CANCEL)
    worker()
    ends = [until(workbench, job, has(JobStatus.COMPLETED)) for job in (second, first)]
    assert [end.completed_at is not None for end in ends] == [True, True]
    assert ends[0].completed_at < ends[1].started_at  # type: ignore[operator]
    assert workbench.adapters.names() == {"later", "sooner"}
    never = workbench.jobs.require(cancelled.id)
    assert (never.status, never.started_at) == (JobStatus.CANCELLED, None)


@pytest.mark.slow
def test_an_engine_outlives_its_worker_and_the_next_one_adopts_it(
    workbench: Workbench, queued: Queues, worker: Callable[[], subprocess.Popen[bytes]]
) -> None:
    job, first = queued("adopted", epochs=12), worker()
    running = until(workbench, job, saved(workbench))
    first.kill()
    first.wait()
    with pytest.raises(Conflict, match="an engine process runs in .* already"):
        start_engine(workbench.path(job.folder))
    worker()
    ended = until(workbench, job, has(JobStatus.COMPLETED))
    assert starts(workbench, job) == 1, "one engine from its start to its end"
    assert (running.started_at, ended.tries) == (ended.started_at, 0)
    assert workbench.adapters.names() == {"adopted"}


@pytest.mark.slow
def test_a_killed_engine_is_started_again_from_its_checkpoint_and_paused_and_resumed(
    workbench: Workbench, queued: Queues, worker: Callable[[], subprocess.Popen[bytes]]
) -> None:
    job = queued("killed", epochs=40)
    worker()
    running = until(workbench, job, saved(workbench))
    assert running.pid is not None
    os.kill(running.pid, signal.SIGKILL)
    again = until(workbench, job, lambda job: job.pid not in (None, running.pid))
    assert again.tries == 1
    until(workbench, job, has(JobStatus.TRAINING))
    assert read_json(workbench.path(job.folder) / "machine.json")["micro_batch"] < 4096, "it computes less at once"
    ask(workbench, job, JobRequest.PAUSE)
    paused = until(workbench, job, has(JobStatus.PAUSED))
    assert (paused.pid, paused.request, paused.reason_code) == (None, None, "paused")
    queue_again(workbench, paused)
    until(workbench, job, has(JobStatus.TRAINING))
    ask(workbench, job, JobRequest.CANCEL)
    assert until(workbench, job, has(JobStatus.CANCELLED)).reason_code == "cancelled"


@pytest.mark.slow
def test_a_worker_that_slept_through_its_lease_changes_nothing(
    workbench: Workbench, queued: Queues, worker: Callable[[], subprocess.Popen[bytes]]
) -> None:
    job, sleeper = queued("taken", epochs=25), worker()
    until(workbench, job, saved(workbench))
    sleeper.send_signal(signal.SIGSTOP)
    worker()
    until(workbench, job, lambda job: workbench.jobs.lease_of(job.id)[0] == 2)
    sleeper.send_signal(signal.SIGCONT)
    ended = until(workbench, job, has(JobStatus.COMPLETED))
    assert (starts(workbench, job), ended.tries) == (1, 0)
    assert len(workbench.adapters.list()) == 1
    assert sleeper.poll() is None, "it goes on with other jobs"


def test_what_cannot_be_asked_is_said(workbench: Workbench, queued: Queues) -> None:
    job = queued("asked")
    with pytest.raises(Conflict, match=f"{job.id} is queued, so it cannot checkpoint"):
        ask(workbench, job, JobRequest.CHECKPOINT)
    with pytest.raises(Conflict, match=f"{job.id} is queued already"):
        queue_again(workbench, job)
    assert ask(workbench, job, JobRequest.PAUSE).status is JobStatus.PAUSED
    assert ask(workbench, job, JobRequest.PAUSE).status is JobStatus.PAUSED
    assert queue_again(workbench, job).status is JobStatus.QUEUED
    for _ in range(2):
        assert ask(workbench, job, JobRequest.CANCEL).status is JobStatus.CANCELLED
    assert not ACTIVE & {row.status for row in workbench.jobs.list()}


def fill(disk: Path) -> Path:
    """A file that takes all that is free."""
    path = disk / "filler"
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(65_536))
    return path


@pytest.mark.slow
def test_a_full_disk_pauses_a_run_which_goes_on_when_there_is_room(
    workbench: Workbench, queued: Queues, tmp_path: Path
) -> None:
    worker = Worker(workbench, 1, lambda job, text: None)

    def look_until(reached: Callable[[Job], bool]) -> Job:
        deadline = time.monotonic() + 120
        while not reached(found := workbench.jobs.require(job.id)):
            assert time.monotonic() < deadline, f"{found.status}: {found.reason}"
            worker.look()
            time.sleep(0.05)
        return found

    job = queued("full", epochs=40)
    folder = workbench.path(job.folder)
    (tmp_path / "order").write_bytes((folder / "job.json").read_bytes())
    with mounted(folder, megabytes=30):
        (folder / "job.json").write_bytes((tmp_path / "order").read_bytes())
        look_until(saved(workbench))
        filler = fill(folder)
        paused = look_until(has(JobStatus.PAUSED))
        assert paused.reason_code == "disk_full"
        assert "the disk is full" in str(paused.reason)
        filler.unlink()
        worker.next_disk_look = 0.0
        assert look_until(has(JobStatus.COMPLETED)).tries == 0
        steps = [event.data["step"] for event in job_events(workbench, job, type="step")]
        assert sorted(set(steps)) == list(range(1, 81))


def test_a_run_whose_checkpoints_would_not_fit_does_not_begin(
    workbench: Workbench, queued: Queues, tmp_path: Path
) -> None:
    job = queued("too-large")
    order = (workbench.path(job.folder) / "job.json").read_bytes()
    with mounted(workbench.path(job.folder), megabytes=1):
        (workbench.path(job.folder) / "job.json").write_bytes(order)
        with pytest.raises(JobFailed, match=r"the run's checkpoints need \d MB, and \d MB are free") as failure:
            run_in_foreground(workbench, job, lambda event: None)
        paused = workbench.jobs.require(job.id)
        assert (paused.status, paused.reason_code) == (JobStatus.PAUSED, "disk_full")
        assert (paused.needed_bytes or 0) > 1_000_000, "what it needs, and not what was free"
        Worker(workbench, 1, lambda job, text: None).wake_for_room()
        assert workbench.jobs.require(job.id).status is JobStatus.PAUSED
    assert failure.value.code == "disk_full"


def test_the_strongest_request_stays(workbench: Workbench, queued: Queues) -> None:
    job, _ = workbench.jobs.take(queued("asked").id, "here", {JobStatus.QUEUED})
    for request, stays in (
        (JobRequest.CHECKPOINT, JobRequest.CHECKPOINT),
        (JobRequest.PAUSE, JobRequest.PAUSE),
        (JobRequest.CHECKPOINT, JobRequest.PAUSE),
        (JobRequest.CANCEL, JobRequest.CANCEL),
        (JobRequest.PAUSE, JobRequest.CANCEL),
    ):
        assert ask(workbench, job, request).request is stays
        assert read_request(workbench.path(job.folder)) is stays


def test_two_requests_at_once_leave_the_same_in_row_and_folder(
    workbench: Workbench, queued: Queues, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = workbench.jobs.take(queued("asked").id, "here", {JobStatus.QUEUED})
    later = [JobRequest.CANCEL]

    def ask_another(point: str) -> None:
        if point == "job.asked" and later:
            ask(workbench, job, later.pop())

    monkeypatch.setattr(jobs, "fault_point", ask_another)
    ask(workbench, job, JobRequest.PAUSE)
    assert workbench.jobs.require(job.id).request is JobRequest.CANCEL
    assert read_request(workbench.path(job.folder)) is JobRequest.CANCEL
