"""Adapters, their exports and base models as the REST API shows them, with the workbench design's field names."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lorasmith.schemas.adapters import QuantizationType
from lorasmith.schemas.jobs import JobStatus
from lorasmith.schemas.models import ModelFacts

ADAPTER_EXAMPLE = "adapter_01JD0000000000000000000000"
EXPORT_EXAMPLE = "job_01JD0000000000000000000000"
FOLDER_BELOW_ROOT = r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*){0,8}$"


class LoRAConfigResource(BaseModel):
    rank: int = Field(examples=[32])
    alpha: float = Field(examples=[64])
    dropout: float = Field(examples=[0.05])
    target_modules: list[str] = Field(examples=[["q_proj", "v_proj"]])
    bias: str = "none"


class AdapterResource(BaseModel):
    """A stored PEFT folder. `digest` is the identity of its content."""

    id: str = Field(examples=[ADAPTER_EXAMPLE])
    name: str = Field(examples=["support-v2"])
    description: str | None = None
    base_model: str = Field(examples=["starter"])
    training_job_id: str | None
    dataset: str | None = Field(description="Name of the dataset that it was trained on.")
    lora_config: LoRAConfigResource
    file_path: str = Field(description="Below the home folder. To read, not to send.")
    file_size: int = Field(description="Bytes.")
    digest: str
    metrics: dict[str, Any]
    created_at: datetime
    is_merged: bool = Field(description="A whole model with it merged in has been exported.")
    gguf_path: str | None = Field(description="Newest GGUF file below the home folder. To read, not to send.")


class ExportRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"format": "gguf", "quantization": "Q8_0"}]}
    )

    format: Literal["gguf", "merged"] = "gguf"
    quantization: QuantizationType = Field("F16", description="Of a GGUF file; in any case of letters.")

    @field_validator("quantization", mode="before")
    @classmethod
    def in_capitals(cls, name: Any) -> Any:
        return name.upper() if isinstance(name, str) else name


class ExportResource(BaseModel):
    """One export. `checks` compare what was written with base and adapter."""

    id: str = Field(examples=[EXPORT_EXAMPLE], description="Of the job that writes it.")
    adapter_id: str | None = Field(description="null where the adapter has been removed.")
    adapter_name: str
    format: Literal["gguf", "merged"]
    quantization: QuantizationType
    status: JobStatus
    file_path: str | None = Field(description="Below the home folder; null until it is written, or elsewhere.")
    size_bytes: int | None
    checks: dict[str, Any]
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    error: str | None


class ModelResource(BaseModel):
    """A base model. Only safetensors are read, and no code of a model is ever run."""

    model_config = ConfigDict(protected_namespaces=())

    id: str = Field(examples=["model_01JD0000000000000000000000"])
    name: str = Field(examples=["qwen"])
    source: Literal["built-in", "folder", "hub"]
    hub_id: str | None = Field(examples=["Qwen/Qwen3-0.6B"])
    facts: ModelFacts | None = Field(description="null for a hub model, which is fetched when it is first used.")
    created_at: datetime


class ModelRequest(BaseModel):
    """Either a hub id, or a folder below one of the server's import roots (`LORASMITH_IMPORT_ROOTS`)."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"name": "qwen", "hub_id": "Qwen/Qwen3-0.6B"}, {"folder": "tiny-llama"}]},
    )

    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Absent: the id, or the folder's name."
    )
    hub_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=200
    )
    folder: str | None = Field(None, pattern=FOLDER_BELOW_ROOT, max_length=400)
