"""Augmentation: new examples from those of a dataset, written by a teacher and accepted by a reviewer."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorasmith.schemas.data import MadeBy
from lorasmith.schemas.jobs import now
from lorasmith.schemas.teachers import Reach, TeacherSpec

LANGUAGE_CODE = r"^[a-z]{2,3}$"


class AugmentationMethod(StrEnum):
    """What a teacher writes: another wording of the request (`rephrase`, `back-translate`), reasoning before the answer
    (`expand`), or a wrong answer (`negative`)."""

    REPHRASE = "rephrase"
    EXPAND = "expand"
    NEGATIVE = "negative"
    BACK_TRANSLATE = "back-translate"

    @property
    def rewords(self) -> bool:
        return self in (AugmentationMethod.REPHRASE, AugmentationMethod.BACK_TRANSLATE)


class AugmentationSpec(BaseModel):
    """What `data augment` was asked to do."""

    model_config = ConfigDict(extra="forbid")

    data: str = Field(description="Name of a dataset; rows of its train part are augmented.")
    method: AugmentationMethod
    teacher: TeacherSpec
    n: int = Field(1, ge=1, le=20, description="Texts to ask for per row.")
    language: str | None = Field(None, pattern=LANGUAGE_CODE, description="ISO 639-1, between the translations.")
    max_rows: int | None = Field(None, ge=1, description="The first so many rows of the train part that can be used.")
    name: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Of the job and of the dataset to be."
    )
    max_similarity: float = Field(
        0.9, gt=0, le=1, description="Jaccard similarity of word 3-grams from which a text repeats another."
    )

    @model_validator(mode="after")
    def language_goes_with_translation(self) -> AugmentationSpec:
        if self.method is AugmentationMethod.BACK_TRANSLATE:
            self.language = self.language or "fr"
        elif self.language is not None:
            raise ValueError(f"a language belongs to back-translate, got {self.language!r} with {self.method}")
        return self


class AugmentationInputs(BaseModel):
    """What an augmentation spec resolved to; `train_file` is absolute."""

    dataset_id: str
    dataset_name: str
    dataset_sha256: str
    train_file: str
    reach: Reach


RowReason = Literal[
    "not-json", "wrong-shape", "empty", "cut", "filtered", "refused-by-endpoint", "no-answer", "unsuitable"
]


class AugmentedRow(BaseModel):
    """What became of one source row; a later line of the same row replaces it.

    `answered` has texts; `rejected` has an answer that is not what was asked for; `failed` has none, and a resumed job
    asks again; `skipped` was not asked.
    """

    row: int
    example_id: str
    fate: Literal["answered", "rejected", "failed", "skipped"]
    time: datetime = Field(default_factory=now)
    texts: list[str] = []
    reason: RowReason | None = None
    sentence: str | None = None
    prompt: str = Field(description="Method and version of its prompt.")


class AugmentationResult(BaseModel):
    """Rows of each fate and what was sent and received, of all runs of the job."""

    rows: dict[str, int]
    requests: int
    repeated_requests: int
    prompt_tokens: int
    completion_tokens: int
    estimated_answers: int = Field(description="Answers whose tokens the endpoint did not count.")
    seconds: float = Field(description="Of the last run.")


CandidateReason = Literal[
    "identical", "too-similar", "too-short", "too-long", "wrong-language", "broken-text", "leaks", "says-it-twice"
]


class Candidate(BaseModel):
    """One text of a teacher. `id` is the source's row and the text's number in it, such as 17.2.

    `score` is 1 less `similarity`, the greatest to its source and to earlier texts of the row: how new it is, not how
    good.
    """

    id: str
    row: int
    example_id: str
    text: str
    fate: Literal["pending", "rejected"]
    reason: CandidateReason | None = None
    sentence: str | None = None
    similarity: float
    score: float
    made_by: MadeBy


class Decision(BaseModel):
    """What a reviewer said of a candidate; a later decision replaces it. `text` is there where it was edited."""

    candidate: str
    accepted: bool
    text: str | None = None
    by: str
    time: datetime = Field(default_factory=now)


class ReviewItem(BaseModel):
    """A candidate beside what it was made from. `state` is what counts now; `source` is what the text takes the place of
    (a request or an answer), `request` what the user asked."""

    state: Literal["pending", "accepted", "rejected"]
    candidate: Candidate
    decision: Decision | None = None
    request: str
    source: str

    @property
    def text(self) -> str:
        """With the reviewer's edit."""
        return (self.decision.text if self.decision else None) or self.candidate.text
