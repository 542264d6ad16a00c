"""Jobs: create one, run it in the foreground, and bring rows up to date with what their folders say."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorasmith.errors import STOPS, Conflict, JobFailed, Killed
from lorasmith.files import new_id
from lorasmith.jobs.folder import (
    EventReader,
    newest_checkpoint_name,
    note_kill,
    read_error,
    read_result,
    write_error,
    write_order,
    write_request,
)
from lorasmith.jobs.runner import follow, start_engine
from lorasmith.schemas.jobs import ENDED, Event, Job, JobError, JobKind, JobOrder, JobRequest, JobStatus, now
from lorasmith.services.job_outcomes import keep_outcome
from lorasmith.services.workbench import Workbench

PHASE_STATUS = {
    JobKind.TRAINING: {"load": JobStatus.PREPARING, "tokenize": JobStatus.PREPARING, "train": JobStatus.TRAINING},
}

KEEPS_ITS_WORK = {JobKind.TRAINING, JobKind.AUGMENTATION}  # kinds that stop with what is done saved, and go on from it

RESTARTS = 3  # of an engine that the system kills and that has saved nothing new since the last time

Watch = Callable[[Event], None]


def create_job(workbench: Workbench, kind: JobKind, name: str, spec: dict[str, Any], inputs: dict[str, Any]) -> Job:
    """Write the folder, then the row."""
    job_id = new_id("job")
    folder = f"jobs/{job_id}"
    write_order(workbench.path(folder), JobOrder(id=job_id, kind=kind, spec=spec, inputs=inputs))
    return workbench.jobs.add(Job(id=job_id, kind=kind, name=name, spec=spec, folder=folder))


def run_in_foreground(workbench: Workbench, job: Job, watch: Watch) -> Job:
    """Run a job's engine and wait for it; what it made is stored. Raises what the job raised.

    Training that the system kills goes on from its last checkpoint, each time with half as much at once, until it has been
    killed `RESTARTS` times more without a new checkpoint.
    """
    folder = workbench.path(job.folder)
    left, reached = RESTARTS, newest_checkpoint_name(folder)
    try:
        while True:
            try:
                run_engine(workbench, job, watch)
                return job
            except Killed as killed:
                if job.kind is not JobKind.TRAINING:
                    raise
                if newest_checkpoint_name(folder) > reached:
                    left, reached = RESTARTS, newest_checkpoint_name(folder)
                if not left:
                    raise given_up(folder) from killed
                left -= 1
                note_kill(folder)
                text = f"the system killed the engine process, most often for its memory; it goes on from {reached or 'the start'} with half as much at once"
                watch(Event(seq=0, time=now(), type="warning", data={"text": text}))
    finally:
        settle(workbench, job)


def run_engine(workbench: Workbench, job: Job, watch: Watch) -> None:
    """One engine process, from its start to its end; the row follows its phases."""
    folder = workbench.path(job.folder)
    reader = EventReader(folder)
    reader.skip_present()
    process = start_engine(folder)
    job.status = JobStatus.PREPARING if job.kind is JobKind.TRAINING else JobStatus.RUNNING
    job.pid, job.started_at = process.pid, job.started_at or datetime.now(UTC)
    job.reason = job.reason_code = job.completed_at = None
    workbench.jobs.replace(job)

    def watch_and_note(event: Event) -> None:
        status = PHASE_STATUS.get(job.kind, {}).get(event.data.get("name", "")) if event.type == "phase" else None
        if status and status is not job.status:
            job.status = status
            workbench.jobs.replace(job)
        watch(event)

    follow(folder, process, reader, watch_and_note)


def given_up(folder: Path) -> JobFailed:
    """The error of a job that was killed too often, which the folder keeps, as the engine could not write it."""
    failure = JobFailed(
        f"the system killed the engine process {RESTARTS + 1} times without a new checkpoint between",
        code="oom",
        hint="close other programs or take a smaller model or shorter rows; lorasmith train --resume goes on",
    )
    write_error(folder, JobError(reason_code=failure.code, message=failure.message, hint=failure.hint))
    return failure


def settle(workbench: Workbench, job: Job) -> Job:
    """Bring an unfinished row up to date with its folder, also when nobody watched the engine end."""
    if job.pid is None and job.status is not JobStatus.QUEUED:
        return job
    folder = workbench.path(job.folder)
    result, error = read_result(folder), read_error(folder)
    if result is not None:
        keep_outcome(workbench, job, result)
        job.status, job.result = JobStatus.COMPLETED, result
    elif error is not None:
        job.status = JobStatus(error.reason_code) if error.reason_code in STOPS else JobStatus.FAILED
        job.reason_code, job.reason = error.reason_code, error.message
    elif job.pid is not None and not is_running(job.pid):
        job.status, job.reason_code = JobStatus.INTERRUPTED, "crashed"
        job.reason = "the engine process ended without a word"
    else:
        return job
    job.pid, job.completed_at = None, datetime.now(UTC)
    return workbench.jobs.replace(job)


def is_running(pid: int) -> bool:
    """Whether that process lives; a zombie, which nobody has waited for, does not."""
    stat = Path(f"/proc/{pid}/stat")
    if stat.parent.parent.joinpath("self").exists():
        return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def list_jobs(workbench: Workbench) -> list[Job]:
    return [settle(workbench, job) for job in workbench.jobs.list()]


def show_job(workbench: Workbench, name_or_id: str) -> Job:
    return settle(workbench, workbench.jobs.require(name_or_id))


def job_events(workbench: Workbench, job: Job, *, type: str | None = None) -> list[Event]:
    return [event for event in EventReader(workbench.path(job.folder)).new_events() if type in (None, event.type)]


def ask(workbench: Workbench, job: Job, request: JobRequest) -> None:
    """Ask a running job to save, pause or cancel at its next safe point; raises `Conflict` when it does not run."""
    if job.pid is None:
        raise Conflict(f"{job.id} is {job.status}, so it cannot {request}")
    if job.kind not in KEEPS_ITS_WORK:
        raise Conflict(f"{job.id} is a job of kind {job.kind}, and only training and augmentation can {request}")
    write_request(workbench.path(job.folder), request)


def resumable(job: Job, kind: JobKind = JobKind.TRAINING) -> Job:
    """The job, if it can go on; raises `Conflict` saying why not."""
    if job.kind is not kind:
        raise Conflict(f"{job.id} is a job of kind {job.kind}, and not of kind {kind}, which goes on here")
    if job.status is JobStatus.COMPLETED:
        raise Conflict(f"{job.id} is completed, there is nothing left to do", hint="start again with another --name")
    if job.status not in {*ENDED, JobStatus.PAUSED}:
        raise Conflict(f"{job.id} is {job.status}, process {job.pid} runs it")
    return job
