"""Datasets as the REST API shows them: the workbench design's field names, and what we know beyond them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.data import DatasetFormat, Example, Fate, LedgerLine, Part
from lorasmith.schemas.uploads import DatasetStatus

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
EXAMPLE_ID = "dataset_01JD0000000000000000000000"


class DatasetResource(BaseModel):
    """A dataset, also one that is still being uploaded or imported, or of which none came."""

    id: str = Field(examples=[EXAMPLE_ID])
    name: str = Field(examples=["support"])
    description: str | None = None
    format: DatasetFormat | None = Field(description="null until the rows have been looked at.")
    status: DatasetStatus
    num_examples: int = Field(examples=[240])
    total_tokens: int | None = Field(description="null where no tokenizer has counted them.")
    version: str | None = Field(
        None, description="A name that stays with this version.", examples=["support@1f3870be274f"]
    )
    file_path: str = Field(description="Below the home folder. To read, not to send.")
    created_at: datetime
    updated_at: datetime
    validation_errors: list[str] | None = Field(description="Why there is no dataset, or how many rows were left out.")
    statistics: dict[str, Any] | None
    part_sizes: dict[Part, int] = Field(description="Examples of train, val and test.")
    fates: dict[Fate, int] = Field(description="Input rows of each fate; together they are all rows of the file.")
    file_name: str | None = Field(None, description="What the sender called the file.")
    source_sha256: str | None = None
    sha256: str | None = Field(None, description="Of the content of the parts; equal datasets have equal ones.")


class DatasetChange(BaseModel):
    """The whole of what can be changed."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"name": "support-v2", "description": "Tickets of 2026"}]}
    )

    name: str = Field(pattern=NAME)
    description: str | None = Field(None, max_length=2000)


class DatasetStatistics(BaseModel):
    dataset_id: str = Field(examples=[EXAMPLE_ID])
    num_examples: int
    total_tokens: int | None
    part_sizes: dict[Part, int]
    fates: dict[Fate, int]
    statistics: dict[str, Any] = Field(description="Turns, characters and roles of the examples.")


class DatasetPreview(BaseModel):
    dataset_id: str = Field(examples=[EXAMPLE_ID])
    part: Part
    total: int = Field(description="Examples of the part.")
    offset: int
    examples: list[Example]


class LedgerPage(BaseModel):
    """Input rows in their order; `next_cursor` is null on the last page."""

    data: list[LedgerLine]
    next_cursor: str | None = None


class UploadRequest(BaseModel):
    """Begins an upload in parts. `options` are further fields of an import, such as `split` or `max_rejected_share`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"name": "support", "file_name": "tickets.jsonl", "size_bytes": 5368709120}]},
    )

    name: str = Field(pattern=NAME)
    file_name: str = Field(min_length=1, max_length=1024, description="Its extension says how the file is read.")
    size_bytes: int = Field(gt=0, le=2**53)
    description: str | None = Field(None, max_length=2000)
    format: DatasetFormat | None = Field(None, description="Absent: found from the rows.")
    options: dict[str, Any] = Field(default_factory=dict)


class UploadResource(BaseModel):
    """`id` is that of the dataset that it becomes; `offset` bytes have arrived and are on the disk."""

    id: str = Field(examples=[EXAMPLE_ID])
    name: str
    file_name: str
    size_bytes: int | None
    offset: int
    status: DatasetStatus
    created_at: datetime


class UploadCompletion(BaseModel):
    model_config = ConfigDict(extra="forbid")

    sha256: str | None = Field(None, pattern="^[0-9A-Fa-f]{64}$", description="Of the whole file, which is compared.")
