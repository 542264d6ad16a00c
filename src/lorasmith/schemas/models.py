"""Base models: where they are and what they are."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.jobs import now


class ModelFacts(BaseModel):
    """Read from `config.json` and the safetensors headers; nothing is loaded."""

    model_config = ConfigDict(protected_namespaces=())

    architecture: str
    model_type: str
    parameters: int
    weights_bytes: int
    dtype: str
    context_tokens: int | None
    vocabulary_size: int | None
    has_chat_template: bool


class BaseModelEntry(BaseModel):
    """A registered base model."""

    id: str
    name: str
    source: Literal["built-in", "folder", "hub"]
    location: str = Field(description="Absolute folder, or hub id.")
    facts: ModelFacts | None = None
    created_at: datetime = Field(default_factory=now)
