"""What training makes of the rows of a dataset: those that a model, a length and a policy cut, split or leave out."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.data import CheckName, Fate, Part, TooLong


class LedgerSpec(BaseModel):
    """How a run would train on a dataset; the fields are those of `training`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = Field(description="`starter`, a local folder, a registered name or a Hugging Face id.")
    template: str | None = Field(None, description="Chat template for a base without one: `chatml` or `plain`.")
    max_seq_length: int = Field(2048, ge=8, description="Tokens; never more than the model's context.")
    too_long: TooLong = Field("error", description="What happens to a row above max_seq_length.")
    allow: list[CheckName] = Field([], description="Checks that are overridden, by name.")


class LedgerInputs(BaseModel):
    """Absolute paths that a ledger spec resolved to. `val_file`: None where the run measures on no rows of the dataset."""

    model_config = ConfigDict(protected_namespaces=())

    model_folder: str
    train_file: str
    val_file: str | None = None
    tokens_folder: str


class TrainedRow(BaseModel):
    """A row that is not trained as it stands. `tokens` as it is rendered, before the cut."""

    row: int
    fate: Literal[Fate.CUT, Fate.SPLIT, Fate.DROPPED, Fate.REFUSED]
    tokens: int
    cut_tokens: int = 0
    examples: int
    refused: str | None = None


class TrainedRows(BaseModel):
    """Of each part the rows that are not trained as they stand, and what stops a run that asks for this."""

    max_tokens: int = Field(description="The lesser of max_seq_length and the model's context.")
    parts: dict[Part, list[TrainedRow]]
    stops: str | None = Field(None, description="Why training refuses to start; None: it starts.")


class LedgerSummary(BaseModel):
    """`lorasmith data ledger --summary`: the fates of all rows."""

    dataset: str
    sha256: str
    rows: int
    fates: dict[Fate, int]
    cut_tokens: int | None = Field(None, description="Of all rows in training; None without a model.")
    max_tokens: int | None = Field(None, description="The lesser of max_seq_length and the model's context.")
    too_long: TooLong | None = None
    stops: str | None = Field(None, description="Why training refuses to start.")
