"""A worker: takes queued jobs, follows their engines, starts crashed ones again, and adopts what others left running."""

from __future__ import annotations

import logging
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from lorasmith.errors import Busy, DiskFull, LorasmithError, LostLease
from lorasmith.faults import fault_point
from lorasmith.files import folder_size_bytes, sweep
from lorasmith.jobs.folder import CHECKPOINTS, EventReader, newest_checkpoint_name, note_kill, write_error
from lorasmith.jobs.leases import LeaseKeeper, holder
from lorasmith.jobs.processes import EngineProcess, engine_runs
from lorasmith.schemas.jobs import ACTIVE, KEEPS_ITS_WORK, Event, Job, JobError, JobKind, JobRequest, JobStatus, now
from lorasmith.services.jobs import backoff_s, begin, conclude, watch_phase
from lorasmith.services.workbench import Workbench
from lorasmith.store.leases import Lease

LOOK_S = 0.2  # between two looks at the engines' events and at the queue
CLAIM_EVERY_S = 1.0  # a claim locks the database, if only for a moment
ADOPT_EVERY_S = 2.0
DISK_EVERY_S = 30.0
AGAIN_S = 10.0  # between two tries of a step that has failed
TRIES = 6  # to store what came of a job; a full disk and a busy database do not count
KILL_AFTER_S = 60.0  # an engine that was asked to cancel and has not ended
SWEPT = (
    "datasets",
    "adapters",
    "evaluations",
    "tokens",
)  # an engine sweeps its own folder, an export the place where it writes
ROOM_BYTES = 16_000_000  # for the log, the events and the charts of a job that goes on after a full disk

log = logging.getLogger(__name__)

Tell = Callable[[Job, str], None]


@dataclass
class Running:
    """A job that this worker answers for."""

    job: Job
    lease: Lease
    process: EngineProcess
    reader: EventReader
    looked_at: float = field(default_factory=time.monotonic)
    asked_at: float | None = None
    wait_until: float = 0.0
    tries: int = 0


class Worker:
    """Runs jobs until it is told to stop. Its engines go on without it, and the next worker adopts them.

    `cores` are what jobs on the CPU may use together. `tell` hears what becomes of each job.
    """

    def __init__(self, workbench: Workbench, cores: int, tell: Tell) -> None:
        self.workbench, self.cores, self.tell = workbench, cores, tell
        self.running: list[Running] = []
        self.keeper = LeaseKeeper(workbench.jobs)
        self.next_adoption = self.next_disk_look = self.next_claim = 0.0

    def run(self, stopped: Callable[[float], bool]) -> None:
        """Work until `stopped(seconds)`, which waits that long, says so."""
        for kind in SWEPT:
            attempt(f"the sweep of {kind}", sweep, self.workbench.path(kind))
        with self.keeper:
            while not stopped(LOOK_S):
                self.look()
            for running in self.running:
                attempt(f"the release of {running.job.id}", self.workbench.jobs.release, running.lease)

    def look(self) -> None:
        """Take every step that is due. One that fails is logged and taken again in `AGAIN_S`; the others go on."""
        for running in list(self.running):
            if time.monotonic() >= running.wait_until and not attempt(running.job.id, self.follow, running):
                running.wait_until = time.monotonic() + AGAIN_S
        at = time.monotonic()
        if at >= self.next_adoption:
            self.next_adoption = at + (ADOPT_EVERY_S if attempt("adoption", self.adopt_all) else AGAIN_S)
        if at >= self.next_disk_look:
            self.next_disk_look = at + DISK_EVERY_S
            attempt("waking", self.wake_for_room)
        if at >= self.next_claim:
            self.next_claim = at + (CLAIM_EVERY_S if attempt("claiming", self.claim_all) else AGAIN_S)

    def follow(self, running: Running) -> None:
        """Read what its engine says; when it has ended, store what came of it."""
        heard = running.reader.offset
        try:
            if running.lease in self.keeper.lost:
                raise LostLease(f"another process answers for {running.job.id} now")
            ended = not running.process.is_alive()
            for event in running.reader.new_events():
                watch_phase(self.workbench, running.job, running.lease, event, lambda event: self.hear(running, event))
            if ended:
                self.end(running)
            elif time.monotonic() - running.looked_at >= ADOPT_EVERY_S:
                running.looked_at = time.monotonic()
                self.insist(running)
        except LostLease as error:
            self.leave(running, error.message)
        except (Busy, DiskFull):
            running.reader.offset = heard  # what the row could not follow yet
            raise

    def hear(self, running: Running, event: Event) -> None:
        if event.type == "warning":
            self.tell(running.job, event.data["text"])

    def insist(self, running: Running) -> None:
        """End an engine that does not read requests, or that has not obeyed a cancellation."""
        job = self.workbench.jobs.require(running.job.id)
        if job.request is not JobRequest.CANCEL:
            return
        if running.asked_at is None:
            running.asked_at = time.monotonic()
            if job.kind not in KEEPS_ITS_WORK:
                running.process.signal(signal.SIGTERM)
        elif time.monotonic() - running.asked_at > KILL_AFTER_S:
            running.process.kill()

    def claim_all(self) -> None:
        while (claimed := self.workbench.jobs.claim(holder(), self.cores)) is not None:
            attempt(f"the start of {claimed[0].id}", self.start, *claimed)

    def start(self, job: Job, lease: Lease) -> None:
        """Start its engine. A job that cannot start has failed; one whose engine runs is adopted when its lease is over."""
        folder = self.workbench.path(job.folder)
        try:
            process = begin(self.workbench, job, lease)
        except LostLease:
            raise
        except Exception as error:
            if engine_runs(folder):
                raise
            log.error("%s did not start", job.id, exc_info=not isinstance(error, LorasmithError))
            if folder.is_dir():
                write_error(folder, JobError(reason_code="crashed", message=f"it did not start: {error}"))
            self.conclude(job, lease)
            return
        reader = EventReader(folder, from_now=True)
        self.running.append(Running(job, lease, process, reader))
        self.keeper.add(lease)
        self.tell(job, f"started as process {process.pid}")

    def adopt_all(self) -> None:
        for abandoned in self.workbench.jobs.abandoned():
            attempt(f"the adoption of {abandoned.id}", self.adopt, abandoned.id)

    def adopt(self, job_id: str) -> None:
        """Go on with a job whose holder is gone: follow its engine, or store what it left."""
        taken = self.workbench.jobs.adopt(holder(), job_id)
        if taken is None:
            return
        job, lease = taken
        folder = self.workbench.path(job.folder)
        process = EngineProcess(folder, job.pid or 0, job.process_started, None)
        running = Running(job, lease, process, EventReader(folder, from_now=True))
        self.keeper.add(lease)
        self.running.append(running)
        if engine_runs(folder):
            self.tell(job, f"adopted, process {job.pid}")
        else:
            self.end(running)

    def end(self, running: Running) -> None:
        """Store what came of it. After `TRIES` the job has failed: what nobody can store must not hold its lane for ever."""
        if running.process.returncode == -signal.SIGKILL and running.job.kind is JobKind.TRAINING:
            note_kill(self.workbench.path(running.job.folder))
        try:
            self.conclude(running.job, running.lease, running.process.returncode)
        except (LostLease, Busy, DiskFull):
            raise
        except Exception as error:
            running.tries += 1
            if running.tries < TRIES:
                raise
            log.exception("what came of %s cannot be stored", running.job.id)
            self.give_up(running, f"what came of it cannot be stored: {error}")
        self.running.remove(running)
        self.keeper.drop(running.lease)

    def give_up(self, running: Running, reason: str) -> None:
        def note(stored: Job) -> None:
            if stored.status in ACTIVE:
                stored.status, stored.reason_code, stored.reason = JobStatus.FAILED, "crashed", reason
                stored.completed_at, stored.pid, stored.process_started, stored.request = now(), None, None, None

        self.workbench.jobs.change(running.job.id, note, lease=running.lease)
        self.workbench.jobs.release(running.lease)
        self.tell(running.job, reason)

    def conclude(self, job: Job, lease: Lease, returncode: int | None = None) -> None:
        """Store what came of it; a crashed job that may go on waits in the queue, each time longer."""
        concluded = conclude(self.workbench, job, lease, returncode, again=True)
        self.next_claim = 0.0
        if concluded.status is JobStatus.QUEUED:
            fault_point("job.queued-again")
        self.workbench.jobs.release(lease, after_s=backoff_s(concluded))
        reason = f": {concluded.reason}" if concluded.reason else ""
        self.tell(concluded, f"{concluded.status}{reason}")

    def leave(self, running: Running, why: str) -> None:
        self.running.remove(running)
        self.keeper.drop(running.lease)
        self.tell(running.job, why)

    def wake_for_room(self) -> None:
        for job in self.workbench.jobs.newest(limit=None, statuses={JobStatus.PAUSED}):
            if job.reason_code == "disk_full":
                attempt(f"waking {job.id}", self.wake, job)

    def wake(self, job: Job) -> None:
        """Queue a job again that a full disk has paused, where there is room now for what it needs."""
        folder = self.workbench.path(job.folder)
        checkpoint = folder_size_bytes(folder / CHECKPOINTS / newest_checkpoint_name(folder))
        if shutil.disk_usage(folder).free > max(job.needed_bytes or 0, 2 * checkpoint) + ROOM_BYTES:
            self.workbench.jobs.change(job.id, queue_if_paused)
            self.tell(job, "goes on, there is room on the disk")


def attempt(what: str, step: Callable[..., object], *given: object) -> bool:
    """Whether a step went well. What it raised is in the log: it ends neither the worker nor the steps of other jobs."""
    try:
        step(*given)
    except LorasmithError as error:
        log.warning("%s: %s", what, error.message)
    except Exception:
        log.exception("%s met an error that lorasmith does not know", what)
    else:
        return True
    return False


def queue_if_paused(job: Job) -> None:
    if job.status is JobStatus.PAUSED and job.reason_code == "disk_full":
        job.status, job.completed_at = JobStatus.QUEUED, None
        job.reason = job.reason_code = None
