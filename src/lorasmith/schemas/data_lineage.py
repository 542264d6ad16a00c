"""Where a dataset version comes from: the chain of steps behind it, and what running the chain again gives."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, Field

from lorasmith.schemas.jobs import now

SHOWN_DIGITS = 12  # of a version's digest, in names


class StepInput(BaseModel):
    """What a step read: a source or a benchmark by its path, a dataset version by its name, the rows of a review by
    their path in the home folder; `id` of the dataset, or of the job that was reviewed."""

    kind: Literal["source", "benchmark", "dataset", "review"]
    name: str
    sha256: str
    id: str | None = None


class DataStep(BaseModel):
    """One recorded step. `spec` holds every option that it ran with, so that it can run again."""

    operation: str = Field(
        description="import, dedup, split, decontaminate, augment, or what another stage calls its own."
    )
    spec: dict[str, Any]
    inputs: list[StepInput]
    sha256: str = Field(description="Digest of the version that came out.")
    lorasmith: str = Field(description="Version of the program that ran it.")
    created_at: datetime = Field(default_factory=now)


class DedupSpec(BaseModel):
    """Near duplicates from `threshold` (0.4 to 1) on are taken out; None takes none out."""

    threshold: float | None


class SplitSpec(BaseModel):
    """What decides the part of each row; all fields as in an import."""

    split: tuple[float, float, float]
    exact: bool
    salt: str
    stratify: Literal["label"] | None


class DecontaminationSpec(BaseModel):
    """Rows that hold an item of the benchmark are taken out of every part, without one the rows of train that hold a row
    of val or test; `similarity` as in a search."""

    benchmark: str | None
    similarity: float
    column_map: dict[str, str] = Field(
        default_factory=dict, description="Columns of a benchmark file, as in an import."
    )


class AppliedReviewSpec(BaseModel):
    """Texts of a teacher that a reviewer accepted and that stand behind the rows of the dataset they were made from."""

    method: str
    teacher: str = Field(description="Model that wrote them.")
    host: str = Field(description="Of the endpoint.")
    job: str
    accepted: int = Field(description="The last so many rows of the review.")
    edited: int
    accepted_by: list[str]
    imported: dict[str, Any] = Field(
        default_factory=dict, description="Options of the import that read the rows, once it has."
    )


class ReplayedStep(BaseModel):
    """One step of a chain, run again. `difference` says where it parts from what was recorded; None where it is equal.

    `note` says what was taken as it is recorded instead of made again.
    """

    operation: str
    recorded: str
    replayed: str
    equal: bool
    difference: str | None = None
    note: str | None = None


class Replay(BaseModel):
    dataset: str
    sha256: str
    equal: bool
    steps: list[ReplayedStep]


class User(BaseModel):
    """Who needs a version: what it is and its name."""

    kind: Literal["job", "adapter", "evaluation", "dataset"]
    name: str
    id: str
