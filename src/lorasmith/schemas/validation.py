"""What a check of rows finds, before anything is imported."""

from __future__ import annotations

from pydantic import BaseModel, Field

from lorasmith.schemas.data import DatasetFormat, Fate, Finding, FindingName


class RowFinding(Finding):
    """A finding and where it stands. `rejected`: an import leaves the row out."""

    file: str
    line: int | None
    row: int
    rejected: bool


class Validation(BaseModel):
    """Counts over all rows that were read; `error` says why an import with the same options would stop."""

    source: str
    format: DatasetFormat | None = Field(description="Absent where none was found.")
    format_reason: str | None
    rows: int
    fates: dict[Fate, int]
    counts: dict[FindingName, int] = Field(description="Findings of each kind; a row may have several.")
    passes: bool
    error: str | None = None
    hint: str | None = None
