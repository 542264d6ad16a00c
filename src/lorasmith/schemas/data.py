"""Datasets: canonical examples, the fate of each input row, and what an import was asked to do."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorasmith.schemas.data_lineage import SHOWN_DIGITS, DataStep
from lorasmith.schemas.jobs import now

Role = Literal["system", "user", "assistant", "tool"]
Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
TooLong = Literal["error", "drop", "left", "right", "split", "cut"]
LOWEST_SIMILARITY = 0.4  # of near duplicates: below, nearly every pair of a large set would have to be compared
CheckName = Literal[
    "stop-token-not-trained",
    "no-trained-token",
    "prompt-differs-when-served",
    "special-token-in-message",
    "template-rewrites-history",
]


FindingName = Literal[
    "unusable",
    "control-characters",
    "mojibake",
    "too-short",
    "too-long",
    "over-context",
    "other-language",
    "secret",
    "personal-data",
]
Mend = Literal["control-characters", "mojibake", "join-turns"]
DatasetKind = Literal["sft", "preference", "kto"]


class DatasetFormat(StrEnum):
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    CHATML = "chatml"
    COMPLETION = "completion"
    INTERACTIONS = "interactions"
    CHAT = "chat"
    CLASSIFICATION = "classification"
    SUMMARIZATION = "summarization"
    PREFERENCE = "preference"
    KTO = "kto"

    @property
    def kind(self) -> DatasetKind:
        """What a dataset of this format can train."""
        kinds: dict[str, DatasetKind] = {"preference": "preference", "kto": "kto"}
        return kinds.get(self.value, "sft")


class ToolFunction(BaseModel):
    """`arguments` by name, as chat templates expect them; OpenAI's files hold them as JSON in a string."""

    model_config = ConfigDict(extra="forbid")

    name: str
    arguments: dict[str, Any]


class ToolCall(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    type: Literal["function"] = "function"
    function: ToolFunction


class Message(BaseModel):
    """One turn. `weight` 0 on an assistant turn: it is read, not trained. The other fields are those of tool use."""

    model_config = ConfigDict(extra="forbid")

    role: Role
    content: str
    weight: Literal[0, 1] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def is_trained(self) -> bool:
        return self.role == "assistant" and self.weight != 0

    @property
    def has_more_than_content(self) -> bool:
        """Whether a chat template is given more of it than role and content."""
        return self.tool_calls is not None or self.tool_call_id is not None or self.name is not None

    def for_template(self) -> dict[str, Any]:
        """What a chat template renders: the fields that are there, without the weight."""
        if not self.has_more_than_content:
            return {"role": self.role, "content": self.content}  # a tenth of the time, and nearly every message
        return self.model_dump(exclude_none=True, exclude={"weight"})


class MadeBy(BaseModel):
    """Where an example comes from that a teacher wrote or changed."""

    model_config = ConfigDict(extra="forbid")

    method: str
    teacher: str = Field(description="Model that wrote it.")
    host: str = Field(description="Of the endpoint.")
    source: str = Field(description="Id of the example that it was made from.")
    prompt: str = Field(description="Method and version of the prompt.")
    job: str
    time: datetime = Field(description="When the answer came.")
    accepted_by: str | None = None
    edited: bool | None = None


class Example(BaseModel):
    """One canonical row: a conversation, or a plain text of which each token is trained.

    A preference has the prompt in `messages` and what follows it in `chosen` and `rejected`; a KTO row has the whole
    conversation in `messages` and says in `desirable` whether its last answer is wanted.
    `id` is the digest of its content; `group` decides the part it falls in; `row` counts input rows from 1.
    """

    id: str
    group: str
    row: int
    messages: list[Message] | None = None
    text: str | None = None
    tools: list[dict[str, Any]] | None = None
    chosen: list[Message] | None = None
    rejected: list[Message] | None = None
    desirable: bool | None = None
    made_by: MadeBy | None = None

    @model_validator(mode="after")
    def either_messages_or_text(self) -> Example:
        if (self.messages is None) == (self.text is None):
            raise ValueError("an example has either messages or text")
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("a preference has a chosen and a rejected answer")
        return self

    def prompt_messages(self) -> list[Message]:
        """The turns before the last assistant turn."""
        assert self.messages is not None
        last = max(index for index, message in enumerate(self.messages) if message.role == "assistant")
        return self.messages[:last]

    def answer(self) -> str:
        """The last assistant turn, or the whole text."""
        if self.messages is None:
            return self.text or ""
        return next(message.content for message in reversed(self.messages) if message.role == "assistant")

    def content(self) -> dict[str, Any]:
        """What the row says, without where it came from and where it goes."""
        return self.model_dump(include=CONTENT_FIELDS, exclude_none=True)


CONTENT_FIELDS = {"messages", "text", "tools", "chosen", "rejected", "desirable"}


class Fate(StrEnum):
    """What became of an input row: when the dataset was made, and, the last four, when a model is trained on it."""

    KEPT = "kept"
    CHANGED = "changed"
    EXACT_DUPLICATE = "exact_duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    LEAKS = "leaks"
    REJECTED = "rejected"
    CUT = "cut"
    SPLIT = "split"
    DROPPED = "dropped"
    REFUSED = "refused"


STAYS = (Fate.KEPT, Fate.CHANGED)  # fates of rows that have an example
IN_TRAINING = (Fate.CUT, Fate.SPLIT, Fate.DROPPED, Fate.REFUSED)  # they depend on model, length and policy


class Finding(BaseModel):
    """One thing about one row: which field (`row` for the whole of it), what was found there, what was expected.

    `unusable`: no example can be made of the row.
    """

    check: FindingName
    field: str
    found: str
    expected: str

    def sentence(self) -> str:
        where = "" if self.field == "row" else f"field `{self.field}`: "
        return f"{where}found {self.found}, expected {self.expected}"


class LedgerLine(BaseModel):
    """What became of one input row. `line` is its line in `file` where the format has lines.

    `changes` says how a changed row was mended; `similarity` (0 to 1) how near a near duplicate is to
    `duplicate_of_row`; `leaks_into` which item of which benchmark the row holds; `flags` what was found in a row that
    stays or is rejected; `tokens` how long its contents are, where a tokenizer was given. `asked_part` is the part that
    the row itself asks for, `own_group` its group where it was joined with others. Where training is asked about, of a
    row that it does not take as it stands: `rendered_tokens` how long it is, `cut_tokens` how many of them are cut, and
    `examples` how many are made of it.
    """

    row: int
    file: str
    line: int | None = None
    fate: Fate
    part: Part | None = None
    asked_part: Part | None = None
    own_group: str | None = None
    example_id: str | None = None
    duplicate_of_row: int | None = None
    similarity: float | None = None
    leaks_into: str | None = None
    changes: list[str] | None = None
    cut_tokens: int | None = None
    rendered_tokens: int | None = None
    examples: int | None = None
    tokens: int | None = None
    language: str | None = None
    field: str | None = None
    reason: str | None = None
    flags: list[Finding] | None = None


class DataPreparationSpec(BaseModel):
    """How the rows of a file become train, val and test: `data prepare` asks this, `data import` and a name."""

    model_config = ConfigDict(extra="forbid")

    format: DatasetFormat | Literal["auto"] = "auto"
    split: tuple[float, float, float] = Field(default=(0.8, 0.1, 0.1), description="Shares of train, val and test.")
    exact: bool = Field(
        default=False, description="Sort by the hash and cut, so that shares are exact for a small set."
    )
    salt: str = Field(default="lorasmith", description="Part of each group's hash; another salt gives another split.")
    stratify: Literal["label"] | None = Field(
        default=None, description="Hold the shares within each label, for rows in the order in which they come."
    )
    max_rejected_share: float = Field(
        default=0.0, ge=0, le=1, description="Share of bad rows above which the import stops."
    )
    max_rows: int | None = Field(default=None, ge=1, description="Read at most this many rows, the first ones.")
    strict: bool = Field(default=False, description="Stop at the first finding, also at one that only flags a row.")
    column_map: dict[str, str] = Field(
        default_factory=dict, description="Field of the format → column of the file, with dots into objects."
    )
    encoding: str | None = Field(default=None, description="Of a CSV file; absent: found from its bytes.")
    mend: list[Mend] = Field(default_factory=list, description="What is mended in a row instead of flagged.")
    reject: list[FindingName] = Field(default_factory=list, description="Findings that reject a row.")
    min_chars: dict[str, int] = Field(default_factory=dict, description="Field → fewest characters that it may have.")
    max_chars: dict[str, int] = Field(default_factory=dict, description="Field → most characters that it may have.")
    languages: list[str] = Field(default_factory=list, description="ISO 639-1 codes; rows in another are flagged.")
    near_duplicates: float | None = Field(
        default=None,
        ge=LOWEST_SIMILARITY,
        le=1,
        description="Similarity from which a row is a near duplicate and is taken out; absent: none is.",
    )
    tokenizer: str | None = Field(default=None, description="Model whose tokenizer and context measure the rows.")

    @model_validator(mode="after")
    def shares_add_up(self) -> DataPreparationSpec:
        adds_up = abs(sum(self.split) - 1) <= 1e-6  # false for a nan
        if min(self.split) < 0 or self.split[0] <= 0 or not adds_up:
            raise ValueError(f"the shares of train, val and test must be at least 0 and add up to 1, got {self.split}")
        return self

    @model_validator(mode="after")
    def one_way_to_split(self) -> DataPreparationSpec:
        if self.exact and self.stratify:
            raise ValueError("`exact` cuts all rows and `stratify` each label: give one of them")
        return self


class DataImportSpec(DataPreparationSpec):
    """What `data import` was asked to do."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of the new dataset.")


class Detection(BaseModel):
    """Which format a file has and why."""

    format: DatasetFormat
    reason: str


class SetAside(BaseModel):
    """A row that a decision took out, as it was read: what the decision needs when it is made anew."""

    line: LedgerLine
    example: Example


class Dataset(BaseModel):
    """A version of a stored dataset; `folder` is relative to the home folder and holds `<part>.jsonl`, `ledger.jsonl`
    and `set_aside.jsonl`.

    The newest version has the plain name, an older one `NAME@` and the first digits of its digest.
    """

    id: str
    name: str
    description: str | None = None
    format: DatasetFormat
    format_reason: str
    kind: DatasetKind = "sft"
    source: str
    source_sha256: str
    spec: DataImportSpec | None = Field(
        default=None, description="What the import was asked to do, with what was decided since; None if not imported."
    )
    sha256: str = Field(description="Digest of the parts' content; equal datasets have equal digests.")
    lineage: list[DataStep] = Field(default_factory=list, description="From the source to this version.")
    read_in: str | None = Field(default=None, description="Id of the version whose import read the rows.")
    folder: str
    num_examples: int
    part_sizes: dict[Part, int]
    fates: dict[Fate, int] = Field(description="Input rows of each fate; together they are all rows of the source.")
    statistics: dict[str, Any] = Field(default_factory=dict)
    created_at: datetime = Field(default_factory=now)
    updated_at: datetime | None = Field(default=None, description="When name or description were changed last.")

    @property
    def plain_name(self) -> str:
        return self.name.partition("@")[0]

    @property
    def reference(self) -> str:
        """A name that stays with this version."""
        return f"{self.plain_name}@{self.sha256[:SHOWN_DIGITS]}"
