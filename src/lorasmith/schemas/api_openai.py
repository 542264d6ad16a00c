"""OpenAI's files and fine-tuning jobs, as its own clients send and read them (OpenAPI document 2.3.0)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Auto = Literal["auto"]


class OpenAIFile(BaseModel):
    id: str = Field(examples=["file-01JD0000000000000000000000"])
    object: Literal["file"] = "file"
    bytes: int
    created_at: int = Field(description="Seconds since 1970.")
    filename: str
    purpose: Literal["fine-tune"] = "fine-tune"
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None = None


class FileDeleted(BaseModel):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class Hyperparameters(BaseModel):
    """`auto` is what the preset `balanced` says; `learning_rate_multiplier` multiplies its rate."""

    model_config = ConfigDict(extra="forbid")

    n_epochs: Auto | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class Supervised(BaseModel):
    model_config = ConfigDict(extra="forbid")

    hyperparameters: Hyperparameters = Field(default_factory=Hyperparameters)


class Method(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["supervised"]
    supervised: Supervised = Field(default_factory=Supervised)


class FineTuningRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"model": "starter", "training_file": "file-01JD0000000000000000000000", "suffix": "support"}]
        },
    )

    model: str = Field(max_length=200)
    training_file: str = Field(max_length=64)
    validation_file: str | None = Field(None, max_length=64)
    suffix: str | None = Field(None, min_length=1, max_length=64)
    seed: int | None = Field(None, ge=0, le=2147483647)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(None, description="The older place of `method.supervised`'s.")
    integrations: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description="There are none yet.")
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] | None = Field(
        None, max_length=16
    )

    @property
    def chosen(self) -> Hyperparameters:
        return self.method.supervised.hyperparameters if self.method else self.hyperparameters or Hyperparameters()


class FineTuningError(BaseModel):
    code: str
    message: str
    param: str | None = None


class FineTuningJobResource(BaseModel):
    id: str = Field(examples=["ftjob-01JD0000000000000000000000"])
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None
    organization_id: str = "lorasmith"
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    training_file: str
    validation_file: str | None
    result_files: list[str] = Field(default_factory=list)
    trained_tokens: int | None
    seed: int
    hyperparameters: Hyperparameters
    method: Method
    integrations: list[Any] = Field(default_factory=list)
    metadata: dict[str, str] | None
    error: FineTuningError | None


class FineTuningEvent(BaseModel):
    id: str = Field(examples=["ftevent-01JD0000000000000000000000-12"])
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointMetrics(BaseModel):
    step: float
    train_loss: float | None = None
    valid_loss: float | None = None


class FineTuningCheckpoint(BaseModel):
    id: str = Field(examples=["ftckpt_01JD0000000000000000000000-100"])
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    step_number: int
    fine_tuning_job_id: str
    metrics: CheckpointMetrics


class FileList(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIFile]
    first_id: str | None
    last_id: str | None
    has_more: bool


class JobList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningJobResource]
    has_more: bool


class EventList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningEvent]
    has_more: bool


class CheckpointList(BaseModel):
    object: Literal["list"] = "list"
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None
    has_more: bool
