"""Versions of a dataset over the REST API: how they are made, and how they were."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.api_data import EXAMPLE_ID, NAME
from lorasmith.schemas.data import LOWEST_SIMILARITY
from lorasmith.schemas.data_lineage import ReplayedStep, StepInput


class SplitRequest(BaseModel):
    """What is to change; absent fields stay as they are. Groups of rows stay together."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"split": [0.7, 0.15, 0.15]}]})

    split: tuple[float, float, float] | None = Field(None, description="Shares of train, val and test.")
    salt: str | None = Field(None, max_length=200, description="Another salt gives another split.")
    exact: bool | None = Field(None, description="Make the shares exact.")
    stratify: Literal["label"] | None = Field(None, description="Hold the shares within each label; null ends it.")
    name: str | None = Field(None, pattern=NAME, description="Of a new dataset; absent: a version of this one.")


class DedupRequest(BaseModel):
    """Near duplicates from `threshold` on are taken out; null brings all of them back."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"threshold": 0.85}]})

    threshold: float | None = Field(0.8, ge=LOWEST_SIMILARITY, le=1, description="Similarity of two rows.")
    name: str | None = Field(None, pattern=NAME, description="Of a new dataset; absent: a version of this one.")


class LineageStep(BaseModel):
    """One step; of a file of this machine `inputs` say its name alone."""

    operation: str = Field(examples=["import", "dedup", "split", "decontaminate", "augment"])
    options: dict[str, Any]
    inputs: list[StepInput]
    sha256: str = Field(description="Of the version that came out.")
    lorasmith: str = Field(description="Version of the program that ran it.")
    created_at: datetime


class Lineage(BaseModel):
    """From the source to this version, and the versions of its name."""

    dataset_id: str = Field(examples=[EXAMPLE_ID])
    version: str = Field(examples=["support@1f3870be274f"])
    steps: list[LineageStep]
    versions: list[str] = Field(description="Of the name, the oldest first.", examples=[["support@1f3870be274f"]])


class ReplayResource(BaseModel):
    """Every step run again; nothing of it is stored. A teacher is not asked again: `note` says what was taken instead."""

    dataset_id: str = Field(examples=[EXAMPLE_ID])
    equal: bool
    steps: list[ReplayedStep]
