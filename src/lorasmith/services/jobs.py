"""Jobs: create one, run it in the foreground, ask it to stop or go on, and bring rows up to date with their folders."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from lorasmith.errors import STOPS, Conflict, JobFailed, Killed, LorasmithError
from lorasmith.faults import fault_point
from lorasmith.files import new_id
from lorasmith.jobs.folder import (
    ERROR,
    EventReader,
    gone,
    newest_checkpoint_name,
    note_kill,
    read_error,
    read_result,
    write_error,
    write_order,
    write_request,
)
from lorasmith.jobs.leases import LeaseKeeper, holder
from lorasmith.jobs.processes import EngineProcess, engine_runs, start_engine
from lorasmith.jobs.runner import POLL_S, follow, how_it_ended
from lorasmith.schemas.jobs import (
    ACTIVE,
    KEEPS_ITS_WORK,
    Event,
    Job,
    JobError,
    JobKind,
    JobOrder,
    JobRequest,
    JobStatus,
    now,
)
from lorasmith.services.job_outcomes import keep_outcome
from lorasmith.services.workbench import Workbench
from lorasmith.store.leases import Lease

PHASE_STATUS = {
    JobKind.TRAINING: {"load": JobStatus.PREPARING, "tokenize": JobStatus.PREPARING, "train": JobStatus.TRAINING},
}
STOPS_AS = {JobRequest.PAUSE: JobStatus.PAUSED, JobRequest.CANCEL: JobStatus.CANCELLED}
STOPPED = {JobStatus.PAUSED, JobStatus.INTERRUPTED, JobStatus.FAILED, JobStatus.CANCELLED}
STRENGTH = (JobRequest.CHECKPOINT, JobRequest.PAUSE, JobRequest.CANCEL)  # a stop saves, and cannot be asked to go on
CANCELLABLE = {JobStatus.PAUSED, JobStatus.INTERRUPTED}  # stopped; a failed job has ended, and keeps why

BACKOFF_S = (2.0, 10.0, 60.0)  # before a crashed job is started again
RESTARTS = 3  # of an engine that is killed or crashes and has saved nothing new since the last time

Watch = Callable[[Event], None]

log = logging.getLogger(__name__)


def create_job(
    workbench: Workbench, kind: JobKind, name: str, spec: dict[str, Any], inputs: dict[str, Any], **facts: Any
) -> Job:
    """Write the folder, then the row. A worker runs it, or with `auto_resume=False` this process does, right away.

    `facts` are further fields of `Job`.
    """
    job_id = new_id("job")
    folder = f"jobs/{job_id}"
    write_order(workbench.path(folder), JobOrder(id=job_id, kind=kind, spec=spec, inputs=inputs))
    fault_point("job.ordered")
    facts |= {"base_model": inputs.get("model_name"), "dataset_id": inputs.get("dataset_id")}
    job = Job(id=job_id, kind=kind, name=name, spec=spec, folder=folder, **facts)
    if job.auto_resume:
        workbench.jobs.add(job)
    else:
        workbench.jobs.add_held(job, holder())
    fault_point("job.added")
    return job


def run_in_foreground(workbench: Workbench, job: Job, watch: Watch) -> Job:
    """Run a job's engine and wait for it; what it made is stored. Raises what the job raised.

    Training that the system kills goes on from its last checkpoint, each time with half as much at once, until it has been
    killed `RESTARTS` times more without a new checkpoint.
    """
    folder = workbench.path(job.folder)
    job, lease = workbench.jobs.take(job.id, holder(), set(JobStatus) - ACTIVE)
    workbench.jobs.change(job.id, lambda stored: setattr(stored, "tries", 0), lease=lease)
    with LeaseKeeper(workbench.jobs, lease):
        try:
            process = None
            while True:
                process = begin(workbench, job, lease)
                reader = EventReader(folder, from_now=True)
                try:
                    follow(folder, process, reader, lambda event: watch_phase(workbench, job, lease, event, watch))
                    break
                except Killed as killed:
                    if job.kind is not JobKind.TRAINING:
                        raise
                    note_kill(folder)
                    if not count_restart(workbench, job, lease):
                        raise given_up(workbench, job) from killed
                    reached = newest_checkpoint_name(folder) or "the start"
                    text = f"the system killed the engine process, most often for its memory; it goes on from {reached} with half as much at once"
                    watch(Event(seq=0, time=now(), type="warning", data={"text": text}))
        finally:
            if not engine_runs(folder):
                job = conclude(workbench, job, lease, process.returncode if process else None)
            workbench.jobs.release(lease)
    return job


def begin(workbench: Workbench, job: Job, lease: Lease) -> EngineProcess:
    """Start the engine of a held job; what the job was asked meanwhile is handed on to it."""
    folder = workbench.path(job.folder)
    process = start_engine(folder, job.cores)
    fault_point("job.started")

    def note(stored: Job) -> None:
        stored.pid, stored.process_started = process.pid, process.started
        stored.started_at = stored.started_at or now()
        stored.reason = stored.reason_code = stored.completed_at = None

    stored = workbench.jobs.change(job.id, note, lease=lease)
    fault_point("job.begun")
    if stored.request is not None and stored.kind in KEEPS_ITS_WORK:
        write_request(folder, stored.request)
    return process


def watch_phase(workbench: Workbench, job: Job, lease: Lease, event: Event, watch: Watch) -> None:
    """The row's status follows the engine's phases."""
    status = PHASE_STATUS.get(job.kind, {}).get(event.data.get("name", "")) if event.type == "phase" else None
    if status and status is not job.status:
        workbench.jobs.change(job.id, lambda stored: setattr(stored, "status", status), lease=lease)
        job.status = status
        fault_point("job.phase")
    watch(event)


def count_restart(workbench: Workbench, job: Job, lease: Lease) -> bool:
    """Note an automatic restart; False when `RESTARTS` have gone by without a new checkpoint."""
    reached = newest_checkpoint_name(workbench.path(job.folder))
    return workbench.jobs.change(job.id, lambda stored: count(stored, reached), lease=lease).tries <= RESTARTS


def count(stored: Job, reached: str) -> None:
    if reached > stored.reached:
        stored.tries, stored.reached = 0, reached
    stored.tries += 1


def start_again(stored: Job, reached: str) -> None:
    """A crashed job that may go on waits in the queue; it has failed when it was started again too often."""
    count(stored, reached)
    if stored.tries <= RESTARTS:
        stored.status, stored.completed_at = JobStatus.QUEUED, None
    else:
        stored.status = JobStatus.FAILED
        place = reached or "the start"
        stored.reason = f"the engine process has ended without a word {RESTARTS + 1} times at {place}"


def given_up(workbench: Workbench, job: Job) -> JobFailed:
    """The error of a job that was killed too often, which the folder keeps, as the engine could not write it."""
    failure = JobFailed(
        f"the system killed the engine process {RESTARTS + 1} times without a new checkpoint between",
        code="oom",
        hint="close other programs or take a smaller model or shorter rows; lorasmith train --resume goes on",
    )
    error = JobError(reason_code=failure.code, message=failure.message, hint=failure.hint)
    write_error(workbench.path(job.folder), error)
    return failure


def conclude(
    workbench: Workbench, job: Job, lease: Lease, returncode: int | None = None, *, again: bool = False
) -> Job:
    """Store what the folder of an engine that has ended says: what it made first, then the row.

    `returncode` is that of the process, if this one has started it. With `again`, a job that may go on after a crash is in
    the queue by the same step, so that no crash of this process leaves it where nobody starts it.
    """
    fault_point("job.ended")
    folder = workbench.path(job.folder)
    result, error = read_result(folder), read_error(folder)
    reached = newest_checkpoint_name(folder)
    silent = f"the engine process {how_it_ended(returncode)}" + (f" after {reached} was saved" if reached else "")
    adapter = keep_outcome(workbench, job, result) if result is not None else None

    def note(stored: Job) -> None:
        stored.pid = stored.process_started = None
        stored.completed_at = datetime.now(UTC)
        stored.status, stored.reason_code, stored.reason = verdict(stored, result, error, silent)
        stored.result, stored.request, stored.adapter_id = result, None, adapter.id if adapter else None
        stored.needed_bytes = error.needed_bytes if error else None
        if again and stored.status is JobStatus.INTERRUPTED and stored.reason_code == "crashed" and stored.auto_resume:
            start_again(stored, reached)

    concluded = workbench.jobs.change(job.id, note, lease=lease)
    fault_point("job.concluded")
    return concluded


def verdict(
    job: Job, result: dict[str, Any] | None, error: JobError | None, silent: str
) -> tuple[JobStatus, str | None, str | None]:
    """Status, reason code and reason of a job whose engine has ended; `silent` is the reason where it has given none."""
    wanted = STOPS_AS.get(job.request) if job.request else None
    if result is not None:
        return JobStatus.COMPLETED, None, None
    if error is None:
        return wanted or JobStatus.INTERRUPTED, "crashed", silent
    if error.reason_code in STOPS:
        return wanted or JobStatus(error.reason_code), error.reason_code, error.message
    if error.reason_code == "disk_full" and job.kind is JobKind.TRAINING:
        return JobStatus.PAUSED, error.reason_code, error.message
    return JobStatus.FAILED, error.reason_code, error.message


def backoff_s(job: Job) -> float:
    """How long a concluded job waits before somebody may start it."""
    return BACKOFF_S[min(job.tries, len(BACKOFF_S)) - 1] if job.status is JobStatus.QUEUED else 0.0


def settle_abandoned(workbench: Workbench) -> None:
    """Conclude jobs whose engine has ended and that nobody answers for. One that cannot be concluded stays as it is."""
    for job in workbench.jobs.abandoned():
        try:
            settle(workbench, job)
        except LorasmithError as error:
            log.warning("what came of %s could not be stored: %s", job.id, error.message)
        except Exception:
            log.exception("what came of %s could not be stored", job.id)


def settle(workbench: Workbench, job: Job) -> None:
    if engine_runs(workbench.path(job.folder)):
        return
    taken = workbench.jobs.adopt(holder(), job.id)
    if taken is not None:
        concluded = conclude(workbench, *taken, again=True)
        workbench.jobs.release(taken[1], after_s=backoff_s(concluded))


def list_jobs(workbench: Workbench) -> list[Job]:
    settle_abandoned(workbench)
    return workbench.jobs.list()


def show_job(workbench: Workbench, name_or_id: str) -> Job:
    settle_abandoned(workbench)
    return workbench.jobs.require(name_or_id)


def watch(workbench: Workbench, job: Job, view: Watch) -> Job:
    """Show a job's events from its beginning until it stops; it runs elsewhere."""
    reader = EventReader(workbench.path(job.folder))
    while True:
        for event in reader.new_events():
            view(event)
        job = show_job(workbench, job.id)
        if job.status not in {JobStatus.QUEUED, *ACTIVE}:
            for event in reader.new_events():
                view(event)
            return job
        time.sleep(POLL_S)


def job_events(workbench: Workbench, job: Job, *, type: str | None = None) -> list[Event]:
    return [event for event in EventReader(workbench.path(job.folder)).new_events() if type in (None, event.type)]


def ask(workbench: Workbench, job: Job, request: JobRequest) -> Job:
    """Ask a job to save, pause or cancel. What waits stops at once; what runs does so at its next step.

    Asking twice is asking once. Raises `Conflict` when the job cannot do that as it is.
    """
    direct = STOPS_AS.get(request)

    def note(stored: Job) -> None:
        if direct is not None and stored.status is direct:
            return
        if direct is not None and stored.status is JobStatus.QUEUED:
            stored.status, stored.completed_at = direct, now()
            stored.reason_code, stored.reason = direct.value, f"{direct} before it had started"
        elif request is JobRequest.CANCEL and stored.status in CANCELLABLE:
            stored.status = JobStatus.CANCELLED
        elif stored.status not in ACTIVE:
            raise Conflict(f"{stored.id} is {stored.status}, so it cannot {request}")
        elif stored.kind not in KEEPS_ITS_WORK and request is not JobRequest.CANCEL:
            kinds = " and ".join(KEEPS_ITS_WORK)
            raise Conflict(f"{stored.id} is a job of kind {stored.kind}, and only {kinds} can {request}")
        elif stored.request is None or STRENGTH.index(request) >= STRENGTH.index(stored.request):
            stored.request = request

    stored = workbench.jobs.change(job.id, note)
    fault_point("job.asked")
    if stored.request is request and stored.kind in KEEPS_ITS_WORK:
        workbench.jobs.change(job.id, lambda present: hand_on(workbench, present, request))
        fault_point("job.requested")
    return stored


def hand_on(workbench: Workbench, present: Job, request: JobRequest) -> None:
    """Unless somebody has asked for more since: what the folder says last is what the row says."""
    if present.request is request:
        write_request(workbench.path(present.folder), request)


def queue_again(workbench: Workbench, job: Job) -> Job:
    """Let a worker go on with a stopped job from what it has saved. Raises `Conflict` saying why not."""

    def note(stored: Job) -> None:
        resumable(stored, *sorted(KEEPS_ITS_WORK))
        if not workbench.path(stored.folder).is_dir():
            raise gone(workbench.path(stored.folder))
        (workbench.path(stored.folder) / ERROR).unlink(missing_ok=True)  # it would be taken for the next engine's
        stored.status, stored.auto_resume = JobStatus.QUEUED, True
        stored.tries, stored.request, stored.completed_at = 0, None, None
        stored.reason = stored.reason_code = None

    return workbench.jobs.change(job.id, note)


def resumable(job: Job, *kinds: JobKind) -> Job:
    """The job, if it is of one of the kinds and can go on; raises `Conflict` saying why not."""
    if job.kind not in kinds:
        raise Conflict(
            f"{job.id} is a job of kind {job.kind}, and not of kind {' or '.join(kinds)}, which goes on here"
        )
    if job.status is JobStatus.COMPLETED:
        raise Conflict(f"{job.id} is completed, there is nothing left to do", hint="start again with another --name")
    if job.status is JobStatus.QUEUED:
        raise Conflict(f"{job.id} is queued already", hint="lorasmith worker runs what is queued")
    if job.status not in STOPPED:
        raise Conflict(f"{job.id} is {job.status}, process {job.pid} runs it")
    return job
