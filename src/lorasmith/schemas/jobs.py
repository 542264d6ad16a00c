"""A job: one engine process, its folder and what became of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field


class JobKind(StrEnum):
    TRAINING = "training"
    EVALUATION = "evaluation"
    EXPORT = "export"
    GENERATION = "generation"
    LABELS = "labels"
    ESTIMATE = "estimate"
    AUGMENTATION = "augmentation"
    STATISTICS = "statistics"
    LEDGER = "ledger"


HEAVY = {JobKind.TRAINING, JobKind.EVALUATION}
KEEPS_ITS_WORK = {JobKind.TRAINING, JobKind.AUGMENTATION}  # kinds that stop with what is done saved, and go on from it


class JobStatus(StrEnum):
    QUEUED = "queued"
    PREPARING = "preparing"
    TRAINING = "training"
    RUNNING = "running"  # jobs that do not train
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    INTERRUPTED = "interrupted"


ACTIVE = {JobStatus.PREPARING, JobStatus.TRAINING, JobStatus.RUNNING}
ENDED = {JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.INTERRUPTED}


class JobRequest(StrEnum):
    """What a running training job is asked to do at its next step, in `control.json`."""

    CHECKPOINT = "checkpoint"
    PAUSE = "pause"
    CANCEL = "cancel"


def now() -> datetime:
    return datetime.now(UTC)


class JobOrder(BaseModel):
    """`job.json`: all that the engine needs, so that a folder runs without database or server.

    `spec` is what the user asked for, with every default filled in; `inputs` are the absolute paths it resolved to.
    """

    id: str
    kind: JobKind
    spec: dict[str, Any]
    inputs: dict[str, Any]


class Event(BaseModel):
    """One line of `events.jsonl`; `seq` counts from 1 without a gap."""

    seq: int
    time: datetime
    type: str
    data: dict[str, Any] = Field(default_factory=dict)


def read_event(line: bytes) -> Event | None:
    """None for a line that is none, as a broken disk may leave it: those around it count all the same."""
    try:
        return Event.model_validate(json.loads(line))
    except ValueError:
        return None


def first_event(lines: Iterable[bytes]) -> Event | None:
    """The first one that can be read."""
    return next((event for event in map(read_event, lines) if event is not None), None)


class JobError(BaseModel):
    """`error.json`: `reason_code` is stable, `message` and `hint` are for people.

    `needed_bytes`, of a full disk: with no more free bytes than these it would fail again.
    """

    reason_code: str
    message: str
    hint: str | None = None
    exit_code: int = 1
    needed_bytes: int | None = None


class Job(BaseModel):
    """A stored job; `folder` is relative to the home folder.

    `asked` is what another protocol's request said that `spec` has no field for. `pid` and `process_started` (clock ticks after the machine's start) name its engine process while it runs. `request`
    is what it has been asked and has not done. With `auto_resume` workers run it, and start it again after a crash; `tries` counts automatic restarts since the checkpoint `reached`. One that a full disk
    has paused goes on when more than `needed_bytes` are free.
    """

    id: str
    kind: JobKind
    name: str
    description: str | None = None
    status: JobStatus = JobStatus.QUEUED
    reason_code: str | None = None
    reason: str | None = None
    spec: dict[str, Any]
    asked: dict[str, Any] | None = None
    folder: str
    base_model: str | None = None
    dataset_id: str | None = None
    adapter_id: str | None = None
    priority: int = 0
    device: str = "cpu"
    cores: int | None = None
    auto_resume: bool = True
    request: JobRequest | None = None
    tries: int = 0
    reached: str = ""
    needed_bytes: int | None = None
    pid: int | None = None
    process_started: int | None = None
    created_at: datetime = Field(default_factory=now)
    started_at: datetime | None = None
    completed_at: datetime | None = None
    result: dict[str, Any] | None = None

    @property
    def lane(self) -> str:
        """Where it waits: jobs of one lane share what it has."""
        return self.device if self.kind in HEAVY else "light"
