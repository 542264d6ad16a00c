"""Training jobs as the REST API shows them and takes them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.jobs import JobKind, JobStatus

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
EXAMPLE_JOB = "job_01JD0000000000000000000000"


class QLoRAConfig(BaseModel):
    """How the frozen base is stored while training."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool | Literal["auto"] = Field("auto", description="auto: off on a CPU unless the preset says otherwise.")
    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float32"] | None = Field(
        None, description="null: what the CPU multiplies fastest."
    )


class JobCreate(BaseModel):
    """A training run to queue. What is absent comes from the preset."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "name": "support-lora",
                    "base_model": "starter",
                    "dataset_id": "dataset_01JD0000000000000000000000",
                    "lora_config": {"rank": 16, "alpha": 32},
                    "training_config": {"num_epochs": 1, "learning_rate": 0.0002},
                }
            ]
        },
    )

    name: str | None = Field(None, pattern=NAME, description="Of the adapter; made from model and data when absent.")
    description: str | None = Field(None, max_length=2000)
    base_model: str = Field(max_length=200, description="`starter`, a registered name or a Hugging Face id.")
    dataset_id: str = Field(max_length=200, description="Id or name of a dataset.")
    preset: str = Field("balanced", max_length=64, description="Values to start from.")
    template: str | None = Field(None, max_length=64, description="Chat template for a base without one.")
    lora_config: dict[str, Any] = Field(default_factory=dict, description="Fields of `lora` in the training reference.")
    training_config: dict[str, Any] = Field(
        default_factory=dict, description="Fields of `training` in the training reference."
    )
    qlora_config: QLoRAConfig | None = None
    priority: int = Field(0, ge=-100, le=100, description="Higher goes first.")
    cores: int | None = Field(None, ge=1, le=1024, description="CPU cores that it may use; null: all.")


class JobClone(BaseModel):
    """What a copy has of its own; the rest is the other job's."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"training_config": {"num_epochs": 5}}]})

    name: str | None = Field(None, pattern=NAME)
    description: str | None = Field(None, max_length=2000)
    lora_config: dict[str, Any] = Field(default_factory=dict)
    training_config: dict[str, Any] = Field(default_factory=dict)
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
    lora_config: dict[str, Any]
    training_config: dict[str, Any]
    qlora_config: QLoRAConfig | None
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
    result: dict[str, Any] | None = Field(description="Of jobs that do not train.")
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
