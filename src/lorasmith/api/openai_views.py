"""Our rows in the shapes of OpenAI's clients. Ids keep their ULID and change their prefix, both ways."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from lorasmith.api.jobs import checkpoints, standing
from lorasmith.errors import NotFound
from lorasmith.jobs.events import events_after, last_seq
from lorasmith.jobs.folder import EVENTS
from lorasmith.schemas.api_openai import (
    CheckpointMetrics,
    FineTuningCheckpoint,
    FineTuningError,
    FineTuningEvent,
    FineTuningJobResource,
    Hyperparameters,
    Method,
    OpenAIFile,
    Supervised,
)
from lorasmith.schemas.jobs import ENDED, Event, Job, JobKind, JobStatus
from lorasmith.schemas.uploads import DatasetStatus, Upload
from lorasmith.services.uploads import received_bytes
from lorasmith.services.workbench import Workbench

PREFIXES = {"file-": "dataset_", "ftjob-": "job_"}
STATUSES: dict[JobStatus, Any] = {
    JobStatus.QUEUED: "queued",
    JobStatus.PREPARING: "running",
    JobStatus.TRAINING: "running",
    JobStatus.RUNNING: "running",
    JobStatus.PAUSED: "paused",
    JobStatus.COMPLETED: "succeeded",
    JobStatus.FAILED: "failed",
    JobStatus.INTERRUPTED: "failed",
    JobStatus.CANCELLED: "cancelled",
}
FILE_STATUSES: dict[DatasetStatus, Any] = {DatasetStatus.READY: "processed", DatasetStatus.ERROR: "error"}


def theirs(own_id: str) -> str:
    """`job_01JD…` → `ftjob-01JD…`."""
    prefix, ours = next((prefix, ours) for prefix, ours in PREFIXES.items() if own_id.startswith(ours))
    return prefix + own_id.removeprefix(ours)


def own(their_id: str, prefix: str) -> str:
    """`ftjob-01JD…` → `job_01JD…`. Raises `NotFound` for an id of another kind."""
    ulid = their_id.removeprefix(prefix)
    if not their_id.startswith(prefix) or not (ulid.isascii() and ulid.isalnum() and len(ulid) == 26):
        raise NotFound(f"no such {prefix.rstrip('-')}: {their_id[:60]!r}")
    return PREFIXES[prefix] + ulid


def seconds(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp())


def file_of(workbench: Workbench, upload: Upload) -> OpenAIFile:
    return OpenAIFile(
        id=theirs(upload.id),
        bytes=upload.size_bytes or received_bytes(workbench, upload),
        created_at=int(upload.created_at.timestamp()),
        filename=upload.file_name,
        status=FILE_STATUSES.get(upload.status, "uploaded"),
        status_details=upload.problem,
    )


def job_of(workbench: Workbench, job: Job) -> FineTuningJobResource:
    asked = job.asked or {}
    hyperparameters = Hyperparameters.model_validate(asked.get("hyperparameters") or own_hyperparameters(job))
    failed = STATUSES[job.status] == "failed"
    ended = job.status in ENDED
    eta_s = standing(workbench, job)["metrics"].get("eta_s") if not ended else None
    return FineTuningJobResource(
        id=theirs(job.id),
        created_at=int(job.created_at.timestamp()),
        finished_at=seconds(job.completed_at) if ended else None,
        estimated_finish=int(datetime.now().timestamp() + eta_s) if eta_s is not None else None,
        model=job.base_model or "",
        fine_tuned_model=tuned_name(job, asked) if job.adapter_id else None,
        status=STATUSES[job.status],
        training_file=theirs(job.dataset_id) if job.dataset_id else "",
        validation_file=asked.get("validation_file"),
        trained_tokens=job.result["trained_tokens"] if job.result else None,
        seed=job.spec["training"]["seed"],
        hyperparameters=hyperparameters,
        method=Method(type="supervised", supervised=Supervised(hyperparameters=hyperparameters)),
        metadata=asked.get("metadata"),
        error=FineTuningError(code=job.reason_code or "failed", message=job.reason or "") if failed else None,
    )


def own_hyperparameters(job: Job) -> dict[str, Any]:
    """Of a job that came another way."""
    training = job.spec["training"]
    return {"n_epochs": max(1, round(training["num_epochs"])), "batch_size": min(256, training["batch_size"])}


def tuned_name(job: Job, asked: dict[str, Any]) -> str:
    """`ft:{base}:{organisation}:{suffix}:{8 characters}`."""
    return f"ft:{job.base_model}:lorasmith:{asked.get('suffix') or ''}:{(job.adapter_id or job.id)[-8:].lower()}"


def required_job(workbench: Workbench, their_id: str) -> Job:
    job = workbench.jobs.get(own(their_id, "ftjob-"))
    if job is None or job.kind is not JobKind.TRAINING:
        raise NotFound(f"no fine-tuning job {their_id!r}")
    return job


def event_page(workbench: Workbench, job: Job, before: int | None, limit: int) -> tuple[list[FineTuningEvent], bool]:
    """At most `limit` events older than number `before`, newest first, and whether there are more."""
    path = workbench.path(job.folder) / EVENTS
    newest = last_seq(path) if before is None else before - 1
    first = max(0, newest - limit)
    found = [event for event in events_after(path, first, limit) if event.seq <= newest]
    return [event_of(job, event) for event in reversed(found)], first > 0


def event_of(job: Job, event: Event) -> FineTuningEvent:
    data = event.data
    message, metrics = sentence(event), event.type in ("step", "evaluation")
    fields = {"step": data["step"]} if metrics else {}
    if event.type == "step":
        fields |= {"total_steps": data["total_steps"], "train_loss": data["loss"]}
    elif event.type == "evaluation":
        fields |= {"valid_loss": data["loss"]}
    return FineTuningEvent(
        id=f"ftevent-{job.id.removeprefix('job_')}-{event.seq}",
        created_at=int(event.time.timestamp()),
        level="warn" if event.type == "warning" else "error" if data.get("status") == "failed" else "info",
        message=message,
        type="metrics" if metrics else "message",
        data=fields or data,
    )


def sentence(event: Event) -> str:
    data = event.data
    if event.type == "step":
        return f"Step {data['step']}/{data['total_steps']}: training loss={data['loss']:.2f}"
    if event.type == "evaluation":
        return f"Step {data['step']}: validation loss={data['loss']:.2f}"
    if event.type == "ended":
        return f"The job has ended: {data['status']}" + (f", {data['message']}" if data.get("message") else "")
    known = {"note": data.get("text"), "warning": data.get("text"), "phase": data.get("name")}
    return str(known.get(event.type) or event.type.replace("_", " "))


def checkpoint_list(workbench: Workbench, job: Job) -> list[FineTuningCheckpoint]:
    """Those that the job holds, newest first, each with the losses that were measured there."""
    found = {one.step: one for one in checkpoints(workbench, job)}
    metrics: dict[int, dict[str, float]] = {step: {} for step in found}
    seq, path = 0, workbench.path(job.folder) / EVENTS
    while found and (events := events_after(path, seq, 1000)):
        seq = events[-1].seq
        for event in events:
            if event.type in ("step", "evaluation") and event.data["step"] in metrics:
                loss = "train_loss" if event.type == "step" else "valid_loss"
                metrics[event.data["step"]][loss] = event.data["loss"]
    base = tuned_name(job, job.asked or {})
    return [
        FineTuningCheckpoint(
            id=f"ftckpt_{job.id.removeprefix('job_')}-{step}",
            created_at=int(found[step].created_at.timestamp()),
            fine_tuned_model_checkpoint=f"{base}:ckpt-step-{step}",
            step_number=step,
            fine_tuning_job_id=theirs(job.id),
            metrics=CheckpointMetrics(step=step, **metrics[step]),
        )
        for step in sorted(found, reverse=True)
    ]
