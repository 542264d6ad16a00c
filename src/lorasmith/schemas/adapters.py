"""Adapters as they are stored, and exports of them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.jobs import now

QuantizationType = Literal["F16", "Q8_0"]


class Adapter(BaseModel):
    """A stored PEFT folder; `folder` is relative to the home folder.

    `digest` is the sha256 of its `adapter_config.json` and `adapter_model.safetensors`: one identity everywhere.
    """

    id: str
    name: str
    base_model: str
    base_folder: str
    training_job_id: str | None
    dataset: str | None
    dataset_id: str | None = Field(None, description="Of the version that it was trained on.")
    dataset_sha256: str | None = None
    folder: str
    digest: str
    size_bytes: int
    lora_config: dict[str, Any]
    metrics: dict[str, Any] = Field(default_factory=dict)
    created_at: datetime = Field(default_factory=now)


class ExportSpec(BaseModel):
    """What `export merged` or `export gguf` was asked to write."""

    model_config = ConfigDict(extra="forbid")

    adapter: str
    kind: Literal["merged", "gguf"]
    quantization: QuantizationType = "F16"
    output: str | None = Field(None, description="Target folder (merged) or file (GGUF).")


class ExportInputs(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_folder: str
    model_name: str
    adapter_folder: str
    adapter_name: str
    output: str


class ExportResult(BaseModel):
    """What was written, and how it compares with base + adapter on the probe prompts."""

    kind: Literal["merged", "gguf"]
    path: str
    size_bytes: int
    quantization: QuantizationType | None = None
    checks: dict[str, Any] = Field(default_factory=dict)
