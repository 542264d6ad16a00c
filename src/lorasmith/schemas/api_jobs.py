"""Jobs as the REST API shows them and takes them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.api_training import (
    PRESET_NAME,
    LoRAConfigRequest,
    QLoRAConfigRequest,
    RunRequest,
    TrainingConfigRequest,
)
from lorasmith.schemas.jobs import JobKind, JobStatus
from lorasmith.schemas.training import LoRASpec, TrainingSettings

EXAMPLE_JOB = "job_01JD0000000000000000000000"


class JobCreate(RunRequest):
    """A training run to queue. What is absent comes from the preset."""

    model_config = ConfigDict(
        extra="forbid",
        protected_namespaces=(),
        json_schema_extra={
            "examples": [
                {
                    "name": "support-lora",
                    "base_model": "starter",
                    "dataset_id": "signatures",
                    "preset": "tiny",
                    "lora_config": {"rank": 16, "alpha": 32},
                    "training_config": {"num_epochs": 1, "learning_rate": 0.0002},
                }
            ]
        },
    )

    name: str | None = Field(
        None, pattern=PRESET_NAME, description="Of the adapter; made from model and data when absent."
    )
    description: str | None = Field(None, max_length=2000)
    priority: int = Field(0, ge=-100, le=100, description="Higher goes first.")
    cores: int | None = Field(None, ge=1, le=1024, description="CPU cores that it may use; null: all.")


class JobClone(BaseModel):
    """What a copy has of its own; the rest is the other job's."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"training_config": {"num_epochs": 5}}]})

    name: str | None = Field(None, pattern=PRESET_NAME)
    description: str | None = Field(None, max_length=2000)
    lora_config: LoRAConfigRequest | None = None
    training_config: TrainingConfigRequest | None = None
    priority: int = Field(0, ge=-100, le=100)
    cores: int | None = Field(None, ge=1, le=1024)


class JobResource(BaseModel):
    """A job. `reason_code` is stable and says why it is in its status; `progress` is percent."""

    id: str = Field(examples=[EXAMPLE_JOB])
    kind: JobKind
    name: str
    description: str | None
    base_model: str | None
    dataset_id: str | None
    lora_config: LoRASpec | None = Field(description="null for a job that does not train.")
    training_config: TrainingSettings | None
    qlora_config: QLoRAConfigRequest | None
    status: JobStatus
    reason_code: str | None
    priority: int
    cores: int | None
    progress: float = Field(ge=0, le=100)
    current_step: int
    total_steps: int
    current_loss: float | None = Field(description="Nats per trained token, mean of the last log interval.")
    best_loss: float | None = Field(description="Of the validation part.")
    metrics: dict[str, Any]
    adapter_id: str | None
    adapter_path: str | None = Field(description="Relative to the home folder.")
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    error: str | None


class MetricPoint(BaseModel):
    """A step or an evaluation; `seq` numbers all events of the job."""

    seq: int
    time: datetime
    type: Literal["step", "evaluation"]
    data: dict[str, Any]


class LogLine(BaseModel):
    """A line of what the engine process wrote; `offset` is where it ends, in bytes."""

    offset: int
    text: str


class StreamedStatus(BaseModel):
    """Data of a `status` in a stream."""

    job_id: str = Field(examples=[EXAMPLE_JOB])
    status: JobStatus
    reason_code: str | None
    reason: str | None


class StreamedEvent(BaseModel):
    """Data of what a job says in a stream. `job_id` is there in the stream of all jobs."""

    job_id: str | None = Field(None, examples=[EXAMPLE_JOB])
    seq: int
    time: datetime
    type: str = Field(examples=["step"])
    data: dict[str, Any]


class MetricPage(BaseModel):
    data: list[MetricPoint]
    next_cursor: int | None = Field(description="`seq` of the last point; null on the last page.")


class LogPage(BaseModel):
    data: list[LogLine]
    next_cursor: int | None = Field(description="Where the next line begins, in bytes; null on the last page.")


class CheckpointResource(BaseModel):
    id: str = Field(examples=["step-000120"])
    step: int
    size_bytes: int
    created_at: datetime
