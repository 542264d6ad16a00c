"""A file on its way to become a dataset: `uploads/<id>/upload.json` in the home folder."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from pydantic import BaseModel, Field

from lorasmith.schemas.data import DataImportSpec
from lorasmith.schemas.jobs import now


class DatasetStatus(StrEnum):
    UPLOADING = "uploading"
    PROCESSING = "processing"
    READY = "ready"
    ERROR = "error"


class Upload(BaseModel):
    """`id` is that of the dataset it becomes; `file_name` is what the sender calls it and names nothing on the disk."""

    id: str
    file_name: str
    extension: str = Field(description="Decides how the content is read: `.jsonl`, `.csv.gz`.")
    size_bytes: int | None = Field(None, description="Announced length; None where it comes in one request.")
    description: str | None = None
    spec: DataImportSpec
    status: DatasetStatus = DatasetStatus.UPLOADING
    sha256: str | None = None
    problem: str | None = Field(None, description="Why no dataset came of it.")
    created_at: datetime = Field(default_factory=now)
    updated_at: datetime = Field(default_factory=now)

    @property
    def folder(self) -> str:
        return f"uploads/{self.id}"

    @property
    def content(self) -> str:
        return f"{self.folder}/content{self.extension}"
