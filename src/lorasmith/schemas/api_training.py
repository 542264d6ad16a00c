"""Training runs as the REST API takes them: the workbench design's sections and names, mapped to a `TrainingSpec`."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorasmith.schemas.estimation import MOST_MEASURING_S, Estimate
from lorasmith.schemas.jobs import JobStatus
from lorasmith.schemas.training import LoRASpec, TrainingSettings

PRESET_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class LoRAConfigRequest(LoRASpec):
    """Low-rank adaptation. Absent fields are those of the preset."""

    bias: Literal["none"] = Field("none", description="Biases are not trained.")


class TrainingConfigRequest(TrainingSettings):
    """Steps, batches and rates. Absent fields are those of the preset."""

    bf16: bool | None = Field(None, description="true is `precision: bf16`, false is `precision: fp32`.")
    fp16: Literal[False] | None = Field(None, description="There is no training in fp16 on a CPU; take bf16.")

    @model_validator(mode="after")
    def one_precision(self) -> TrainingConfigRequest:
        if self.bf16 is not None and "precision" in self.model_fields_set:
            raise ValueError("give either precision or bf16")
        return self

    def settings(self) -> dict[str, Any]:
        """Fields of `TrainingSettings` that were given."""
        given = self.model_dump(exclude_unset=True, exclude={"bf16", "fp16"})
        if self.bf16 is not None:
            given["precision"] = "bf16" if self.bf16 else "fp32"
        return given


class QLoRAConfigRequest(BaseModel):
    """The base in 4 or 8 bits while training."""

    model_config = ConfigDict(extra="forbid")

    enabled: bool = True
    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["bfloat16", "float32"] | None = Field(None, description="Absent: as `precision` says.")

    def settings(self) -> dict[str, Any]:
        if not self.enabled:
            return {"quantization": "none"}
        given: dict[str, Any] = {"quantization": "int8" if self.bits == 8 else self.quant_type}
        given["double_quantization"] = self.double_quant
        if self.compute_dtype is not None:
            given["precision"] = {"bfloat16": "bf16", "float32": "fp32"}[self.compute_dtype]
        return given


class RunRequest(BaseModel):
    """What is trained on what, and how: a preset and what differs from it."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    base_model: str = Field(max_length=200, description="`starter`, an added model by name or id, or a hub id.")
    dataset_id: str = Field(max_length=200, description="A stored dataset by id or name, or a built-in one.")
    preset: str = Field("balanced", pattern=PRESET_NAME)
    template: Literal["chatml", "plain"] | None = Field(None, description="For a base without a chat template.")
    lora_config: LoRAConfigRequest | None = None
    training_config: TrainingConfigRequest | None = None
    qlora_config: QLoRAConfigRequest | None = None

    def fields(self) -> dict[str, Any]:
        """What was given, as fields of a `TrainingSpec`."""
        training = self.training_config.settings() if self.training_config else {}
        training |= self.qlora_config.settings() if self.qlora_config else {}
        lora = self.lora_config.model_dump(exclude_unset=True, exclude={"bias"}) if self.lora_config else {}
        values: dict[str, Any] = {"model": self.base_model, "data": self.dataset_id, "preset": self.preset}
        if self.template is not None:
            values["template"] = self.template
        return {**values, "lora": lora, "training": training}


class EstimateRequest(RunRequest):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"base_model": "starter", "dataset_id": "signatures", "preset": "tiny", "measuring_s": 5}]
        },
    )

    measuring_s: float = Field(20, gt=0, le=MOST_MEASURING_S, description="Seconds of measuring, at most.")


class EstimateResource(BaseModel):
    """An estimate on its way or done."""

    id: str = Field(examples=["job_01JD0000000000000000000000"], description="Of the job that measures.")
    status: JobStatus
    estimate: Estimate | None = Field(description="null until it is completed.")
    created_at: datetime
    completed_at: datetime | None
    error: str | None


class PresetResource(BaseModel):
    """Values that a run starts from; what a preset leaves out has the defaults of a run."""

    id: str = Field(examples=["balanced"])
    name: str = Field(examples=["balanced"])
    built_in: bool
    lora_config: dict[str, Any] = Field(examples=[{"rank": 32, "alpha": 64}])
    training_config: dict[str, Any] = Field(examples=[{"learning_rate": 2e-4, "num_epochs": 3}])
    problem: str | None = Field(None, description="Why a file in `presets/` cannot be used.")


class PresetRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"name": "careful", "lora_config": {"rank": 16}, "training_config": {"learning_rate": 5e-5}}]
        },
    )

    name: str = Field(pattern=PRESET_NAME)
    lora_config: LoRAConfigRequest | None = None
    training_config: TrainingConfigRequest | None = None
