"""What is done with a stored dataset over the REST API: checked again, written in another format."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.api_data import EXAMPLE_ID
from lorasmith.schemas.data import DatasetFormat, Fate, FindingName
from lorasmith.schemas.validation import RowFinding

SHOWN_FINDINGS = 100


class ValidationRequest(BaseModel):
    """The checks of an import that look at rows; by default those that always do."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"reject": ["secret"], "languages": ["en"]}]}
    )

    max_rejected_share: float = Field(0.0, ge=0, le=1)
    reject: list[FindingName] = Field([], description="Findings for which an import would leave a row out.")
    min_chars: dict[str, int] = Field({}, description="Field to fewest characters.")
    max_chars: dict[str, int] = Field({}, description="Field to most characters.")
    languages: list[str] = Field([], max_length=50, description="ISO 639-1 codes; rows in another are found.")
    tokenizer: str | None = Field(None, max_length=200, description="Model whose context the rows must fit into.")


class ValidationResource(BaseModel):
    """`passes`: the files are as they were stored, and an import with these checks would take the rows."""

    dataset_id: str = Field(examples=[EXAMPLE_ID])
    passes: bool
    rows: int
    fates: dict[Fate, int]
    counts: dict[FindingName, int] = Field(description="Findings of each kind; a row may have several.")
    findings: list[RowFinding] = Field(description=f"The first {SHOWN_FINDINGS}; `counts` counts all.")
    validation_errors: list[str]
    hint: str | None


class ConversionRequest(BaseModel):
    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"dataset_id": EXAMPLE_ID, "format": "alpaca"}]}
    )

    dataset_id: str = Field(max_length=200, description="Id or name of a stored dataset.")
    format: DatasetFormat
    file_type: Literal["jsonl", "json", "csv", "tsv"] = "jsonl"
    leave_out: bool = Field(False, description="Leave out rows that the format cannot hold, and count them.")


class Conversion(BaseModel):
    """A written file; `/file` below its address sends it."""

    id: str = Field(examples=["conversion_01JD0000000000000000000000"])
    dataset_id: str
    format: DatasetFormat
    file_path: str = Field(description="Below the home folder. To read, not to send.")
    size_bytes: int
    written: int = Field(description="Rows.")
    left_out: dict[str, int] = Field(description="Reason to rows.")
    lost: dict[str, int] = Field({}, description="What the file cannot hold, to rows that have it.")
    created_at: datetime
