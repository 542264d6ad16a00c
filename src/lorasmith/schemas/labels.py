"""What training would do with each token of a row: the order of such a look, and what it saw."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.data import CheckName, Part, TooLong


class LabelSpec(BaseModel):
    """Whose labels to show: rows of a dataset, or of a file that is not imported, as a model would be trained on them."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    data: str = Field(description="Name of a dataset, or a file.")
    model: str = Field(description="`starter`, a local folder, a registered name or a Hugging Face id.")
    part: Part | None = Field(None, description="Absent: train, or the part that holds the rows asked for.")
    rows: tuple[int, int] | None = Field(None, description="First and last input row, counted from 1.")
    n: int = Field(3, ge=1, description="First examples of the part, where no rows are asked for.")
    template: str | None = Field(None, description="Chat template for a base without one: `chatml` or `plain`.")
    max_seq_length: int = Field(2048, ge=8, description="Tokens; never more than the model's context.")
    too_long: TooLong = Field("error", description="What happens to a row above max_seq_length.")
    allow: list[CheckName] = Field([], description="Checks that are overridden, by name.")


class LabelInputs(BaseModel):
    """Absolute paths that a label spec resolved to."""

    model_config = ConfigDict(protected_namespaces=())

    model_folder: str
    examples_file: str


class LabelledToken(BaseModel):
    """`text` is what the token stands for in the rendered row, empty where it goes on with a character of the token before."""

    id: int
    text: str
    role: Literal["trained", "masked", "cut"]
    is_stop: bool = Field(description="Generation ends at this token.")
    is_special: bool


class LabelledExample(BaseModel):
    """One example as it is trained on, and what was cut from its row. A split row has several."""

    tokens: list[LabelledToken]
    total: int = Field(description="Tokens before the cut.")
    trained: int = Field(description="Tokens that carry loss.")
    cut: int
    stop_trained: bool = Field(description="Each answer ends with a trained stop token.")


class FailedCheck(BaseModel):
    check: CheckName
    sentence: str
    mend: str
    overridden: bool


class LabelledRow(BaseModel):
    """`fate` is what training does with the row; `refused` is why it would not start."""

    row: int
    example_id: str
    fate: Literal["kept", "cut", "split", "dropped", "refused"]
    reason: str | None = None
    failed_checks: list[FailedCheck]
    examples: list[LabelledExample]


class LabelReport(BaseModel):
    max_tokens: int
    too_long: TooLong
    rows: list[LabelledRow]
