"""Secrets by name. Their values are in no schema, row, log or answer."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, Field

from lorasmith.schemas.jobs import now

SECRET_NAME = r"^[A-Za-z][A-Za-z0-9_.-]{0,63}$"
LONGEST_SECRET = 8192  # characters


class Secret(BaseModel):
    """Where a secret is kept, and when it was set last."""

    name: str = Field(examples=["openai"])
    kept_in: Literal["keyring", "file"]
    updated_at: datetime = Field(default_factory=now)
