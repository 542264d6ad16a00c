"""Any order of claims, crashes, adoptions, requests and ends: real rows, real folders, real workers; only engines are played."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from lorasmith.errors import STOPS, Conflict, LostLease
from lorasmith.files import append_lines, write_json
from lorasmith.schemas.jobs import ACTIVE, Event, Job, JobKind, JobRequest, JobStatus, now
from lorasmith.services.jobs import RESTARTS, STOPPED, ask, create_job, list_jobs, queue_again
from lorasmith.services.workbench import Workbench
from lorasmith.services.worker import Worker
from lorasmith.settings import Settings
from lorasmith.store import jobs as queue
from lorasmith.store.database import JobRecord, reading
from lorasmith.store.jobs import JobTable
from lorasmith.store.leases import LEASE_S, Lease

QUEUED, PREPARING, TRAINING, RUNNING = JobStatus.QUEUED, JobStatus.PREPARING, JobStatus.TRAINING, JobStatus.RUNNING
ENDS = {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.PAUSED, JobStatus.CANCELLED, JobStatus.INTERRUPTED}
ALLOWED = {
    QUEUED: {PREPARING, RUNNING, JobStatus.PAUSED, JobStatus.CANCELLED},
    PREPARING: {TRAINING, QUEUED, *ENDS},  # queued: crashed, and to be started again
    TRAINING: {PREPARING, QUEUED, *ENDS},
    RUNNING: {QUEUED, *ENDS},
    JobStatus.PAUSED: {QUEUED, JobStatus.CANCELLED},
    JobStatus.INTERRUPTED: {QUEUED, JobStatus.CANCELLED},
    JobStatus.FAILED: {QUEUED},
    JobStatus.CANCELLED: {QUEUED},
    JobStatus.COMPLETED: set(),
}
NO_PROCESS = 1 << 30  # above any process number, so that nothing is signalled
SAYINGS = ["result", "killed", "crashed", "trains", "saves", *STOPS, "disk_full", "non_finite"]


def unexpected(*_: object) -> None:
    """A worker logs what it meets and goes on; here that ends the test."""
    raise  # what is being handled


class PlayedEngine:
    """What `start_engine` gets for a process: it holds the folder's lock until the test ends it."""

    running: ClassVar[dict[Path, PlayedEngine]] = {}
    starts: ClassVar[list[Path]] = []

    def __init__(self, command: list[str], *, pass_fds: tuple[int], **_: Any) -> None:
        self.folder, self.lock = Path(command[-1]), os.dup(pass_fds[0])
        self.returncode: int | None = None
        self.starts.append(self.folder)
        self.pid = NO_PROCESS + len(self.starts)
        assert self.folder not in self.running, "two engines in one folder"
        self.running[self.folder] = self

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        return self.returncode

    def end(self, returncode: int) -> None:
        del self.running[self.folder]
        os.close(self.lock)
        self.returncode = returncode


def training_result() -> dict[str, Any]:
    counts = ("total_steps", "planned_steps", "adapter_step", "trained_tokens", "trainable_parameters")
    counts += ("total_parameters", "peak_memory_bytes", "threads")
    numbers = ("epochs", "validation_loss", "best_validation_loss", "training_time_seconds", "tokens_per_s")
    values = {"adapter_folder": "adapter", "stopped_early": False, "training_loss": [1.0], "precision": "fp32"}
    return {
        **values,
        **dict.fromkeys(counts, 1),
        **dict.fromkeys(numbers, 1.0),
        "rows": {},
        "paths": {},
        "fallback": None,
    }


class JobLifeCycle(RuleBasedStateMachine):
    jobs = Bundle("jobs")

    @initialize()
    def home(self) -> None:
        memory = Path("/dev/shm")  # no power cut is played, so nothing has to reach a disk
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        self.clock = 0.0
        self.workbench = Workbench.open(Settings(home=self.folder))
        PlayedEngine.running.clear()
        PlayedEngine.starts.clear()
        self.tokens: dict[str, tuple[int, str | None]] = {}
        self.never_again: dict[str, int] = {}  # starts of the jobs that were cancelled
        self.leases: list[Lease] = []  # all that anybody ever held
        self.acting = 0
        write, lend, machine = JobTable.write, queue.lend, self

        def remembered(stored: JobRecord, holder: str) -> Lease:
            machine.leases.append(lend(stored, holder))
            return machine.leases[-1]

        def noted(table: JobTable, stored: Any, row: Any) -> None:
            before, after = JobStatus(stored.status), row.status
            assert before is after or after in ALLOWED[before], f"{row.id} went from {before} to {after}"
            write(table, stored, row)

        change = JobTable.change

        def fenced(table: JobTable, job_id: str, how: Callable[[Job], None], *, lease: Lease | None = None) -> Job:
            token = table.lease_of(job_id)[0]
            changed = change(table, job_id, how, lease=lease)
            assert lease is None or lease.token == token, f"{lease.holder} has changed what it holds no more"
            return changed

        self.patches = [
            patch("lorasmith.store.jobs.uptime", lambda: machine.clock),
            patch("lorasmith.store.jobs.lend", remembered),
            patch("lorasmith.services.worker.holder", lambda: f"worker {machine.acting}"),
            patch("lorasmith.services.jobs.holder", lambda: "a command"),
            patch("lorasmith.jobs.processes.subprocess.Popen", PlayedEngine),
            patch.object(JobTable, "write", noted),
            patch.object(JobTable, "change", fenced),
            patch("lorasmith.services.worker.log.exception", unexpected),
            patch("lorasmith.services.jobs.log.warning", unexpected),
        ]
        for one in self.patches:
            one.start()
        self.workers = [self.new_worker() for _ in range(3)]

    def new_worker(self) -> Worker:
        return Worker(self.workbench, 2, lambda job, text: None)

    def teardown(self) -> None:
        if not hasattr(self, "patches"):
            return
        try:
            self.come_to_rest()
        finally:
            for one in self.patches:
                one.stop()
            for engine in list(PlayedEngine.running.values()):
                engine.end(0)
            self.workbench.jobs.engine.dispose()
            shutil.rmtree(self.folder)

    def come_to_rest(self) -> None:
        """Whatever happened, one living worker brings every job to an end."""
        self.workers = [self.new_worker()]
        for _ in range(
            2 + (RESTARTS + 2) * len(self.workbench.jobs.list())
        ):  # each is started again, one after another
            for engine in list(PlayedEngine.running.values()):
                engine.end(1)
            self.clock += 100.0
            self.look(0)
        left = {job.id: job.status for job in self.workbench.jobs.list() if job.status in {QUEUED, *ACTIVE}}
        assert left == {}
        assert self.workbench.jobs.abandoned() == []

    @rule(
        target=jobs,
        kind=st.sampled_from([JobKind.TRAINING, JobKind.TRAINING, JobKind.AUGMENTATION, JobKind.EXPORT]),
        priority=st.integers(0, 1),
    )
    def create(self, kind: JobKind, priority: int) -> str:
        names = ("model_name", "model_folder", "dataset_id", "dataset_name", "dataset_sha256", "train_file")
        inputs = {**dict.fromkeys(names, "x"), "val_file": None, "adapter_name": f"a{len(self.workbench.jobs.list())}"}
        return create_job(self.workbench, kind, "x", {"lora": {}}, inputs, priority=priority, cores=1).id

    @rule(number=st.integers(0, 2))
    def look(self, number: int) -> None:
        self.acting, worker = number, self.workers[number]
        worker.next_claim = worker.next_adoption = worker.next_disk_look = 0.0
        worker.look()

    @rule(number=st.integers(0, 2))
    def renew(self, number: int) -> None:
        self.workers[number].keeper.renew_once()

    @rule(number=st.integers(0, 2))
    def worker_is_killed(self, number: int) -> None:
        self.workers[number] = self.new_worker()

    @rule(seconds=st.sampled_from([1.0, LEASE_S - 1, LEASE_S + 1, 61.0]))
    def wait(self, seconds: float) -> None:
        self.clock += seconds

    def former_leases(self) -> list[Lease]:
        newest = {lease.job_id: lease for lease in self.leases}
        return [lease for lease in self.leases if lease is not newest[lease.job_id]]

    @precondition(lambda self: self.former_leases())
    @rule(data=st.data())
    def a_former_holder_acts(self, data: st.DataObject) -> None:
        """One that has slept through its lease, and has not noticed, whatever the job does now."""
        lease = data.draw(st.sampled_from(self.former_leases()))
        before = self.row_of(lease)
        with pytest.raises(LostLease, match="no longer by"):
            self.workbench.jobs.change(lease.job_id, lambda job: setattr(job, "reason", "from long ago"), lease=lease)
        assert self.workbench.jobs.renew([lease]) == [lease]
        self.workbench.jobs.release(lease)
        assert self.row_of(lease) == before

    @precondition(lambda self: any(worker.running for worker in self.workers))
    @rule(data=st.data(), end=st.sampled_from(SAYINGS))
    def a_worker_sleeps_through_its_lease(self, data: st.DataObject, end: str) -> None:
        """Another one adopts its jobs; then an engine speaks, and the sleeper is the first to hear it."""
        sleeper = data.draw(st.sampled_from([number for number, worker in enumerate(self.workers) if worker.running]))
        held = [(running.lease, running.process.folder) for running in self.workers[sleeper].running]
        self.clock += LEASE_S + 1
        self.look((sleeper + 1) % 3)
        for _, folder in held:
            if folder in PlayedEngine.running:
                self.say(PlayedEngine.running[folder], end)
        before = [row for row in (self.row_of(lease) for lease, _ in held) if row["status"] in ACTIVE]
        self.look(sleeper)
        adopted = {row["id"] for row in before}
        assert [self.row_of(lease) for lease, _ in held if lease.job_id in adopted] == before

    def row_of(self, lease: Lease) -> dict[str, Any]:
        with reading(self.workbench.jobs.engine) as session:
            stored = session.get(JobRecord, lease.job_id)
            return {column.name: getattr(stored, column.name) for column in JobRecord.__table__.columns}

    @precondition(lambda self: PlayedEngine.running)
    @rule(data=st.data(), end=st.sampled_from(SAYINGS))
    def engine_says(self, data: st.DataObject, end: str) -> None:
        self.say(data.draw(st.sampled_from(sorted(PlayedEngine.running.values(), key=lambda engine: engine.pid))), end)

    def say(self, engine: PlayedEngine, end: str) -> None:
        folder = engine.folder
        if end == "trains":
            event = Event(seq=1, time=now(), type="phase", data={"name": "train"})
            append_lines(folder / "events.jsonl", [event.model_dump_json()])
        elif end == "saves":
            step = len(list((folder / "checkpoints").glob("step-*"))) + 1
            write_checkpoint(folder / "checkpoints" / f"step-{step:06d}")
        elif end in ("killed", "crashed"):
            engine.end(-9 if end == "killed" else 1)
        elif end == "result":
            training = self.job_in(folder).kind is JobKind.TRAINING
            if training:
                write_checkpoint(folder / "adapter")
            write_json(folder / "result.json", training_result() if training else {})
            engine.end(0)
        else:
            write_json(folder / "error.json", {"reason_code": end, "message": "as played"})
            engine.end(1)

    def job_in(self, folder: Path) -> Job:
        return next(job for job in self.workbench.jobs.list() if job.folder.endswith(folder.name))

    @rule(job_id=jobs, request=st.sampled_from(JobRequest))
    def ask(self, job_id: str, request: JobRequest) -> None:
        before = self.workbench.jobs.require(job_id)
        self.or_conflict(lambda: ask(self.workbench, before, request))
        after = self.workbench.jobs.require(job_id)
        if request is JobRequest.CANCEL:
            if before.status in {JobStatus.COMPLETED, JobStatus.FAILED}:
                assert (after.status, after.reason) == (before.status, before.reason)
            elif before.status in ACTIVE:
                assert after.request is JobRequest.CANCEL
            else:
                assert after.status is JobStatus.CANCELLED
        if after.status is JobStatus.CANCELLED:
            self.never_again[job_id] = self.starts(after)

    @rule(job_id=jobs)
    def queue_again(self, job_id: str) -> None:
        before = self.workbench.jobs.require(job_id)
        self.or_conflict(lambda: queue_again(self.workbench, before))
        if self.workbench.jobs.require(job_id).status is QUEUED:
            assert before.status in {QUEUED, *STOPPED}
            self.never_again.pop(job_id, None)

    @rule()
    def list_from_a_command(self) -> None:
        list_jobs(self.workbench)

    def or_conflict(self, step: Callable[[], object]) -> None:
        before = self.workbench.jobs.list()
        try:
            step()
        except Conflict:
            assert self.workbench.jobs.list() == before, "what is refused changes nothing"

    def starts(self, job: Job) -> int:
        return PlayedEngine.starts.count(self.workbench.path(job.folder))

    @invariant()
    def tokens_grow_with_each_holder(self) -> None:
        for job in self.workbench.jobs.list() if hasattr(self, "patches") else ():
            token, holder = self.workbench.jobs.lease_of(job.id)
            before, former = self.tokens.get(job.id, (0, None))
            assert token >= before
            assert token > before or holder in (former, None), f"{job.id} went from {former} to {holder}, same token"
            self.tokens[job.id] = token, holder

    @invariant()
    def nobody_shares_a_job(self) -> None:
        for job in self.workbench.jobs.list() if hasattr(self, "patches") else ():
            token = self.workbench.jobs.lease_of(job.id)[0]
            held = [running for worker in self.workers for running in worker.running if running.lease.job_id == job.id]
            assert sum(running.lease.token == token for running in held) <= 1

    @invariant()
    def what_was_cancelled_starts_no_more(self) -> None:
        for job_id, starts in self.never_again.items() if hasattr(self, "patches") else ():
            job = self.workbench.jobs.require(job_id)
            assert (job.status, self.starts(job)) == (JobStatus.CANCELLED, starts)

    @invariant()
    def a_completed_training_has_one_adapter(self) -> None:
        if hasattr(self, "patches"):
            made = [adapter.training_job_id for adapter in self.workbench.adapters.list()]
            assert len(made) == len(set(made))
            done = {job.id for job in self.workbench.jobs.list() if job.status is JobStatus.COMPLETED}
            training = {job.id for job in self.workbench.jobs.list() if job.kind is JobKind.TRAINING}
            assert set(made) == done & training


def write_checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors", "manifest.json"):
        (folder / name).write_text("{}", encoding="utf-8")


JobLifeCycle.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # making a failure smaller takes minutes
    suppress_health_check=list(HealthCheck),
)
TestJobLifeCycle = JobLifeCycle.TestCase
