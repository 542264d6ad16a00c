"""What `lorasmith data stats` finds in a dataset: its content, and how many tokens it is for a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from lorasmith.schemas.data import CheckName, DatasetFormat, Fate, Part
from lorasmith.schemas.estimation import Estimate

MOST_BINS = 16


class Bin(BaseModel):
    """How many values are at least `start` and below `end`; the last bin may be open."""

    start: int
    end: int | None
    count: int


class Distribution(BaseModel):
    """Of whole numbers that are not negative. Percentiles are nearest ranks: values that are there."""

    count: int
    total: int
    mean: float
    min: int
    p50: int
    p90: int
    p95: int
    p99: int
    max: int
    bins: list[Bin]

    @classmethod
    def of(cls, counts: Mapping[int, int]) -> Self:
        """From how often each value is there; there is at least one."""
        count = sum(counts.values())
        total = sum(value * times for value, times in counts.items())
        ranks = nearest_ranks(counts, (50, 90, 95, 99))
        return cls(
            count=count,
            total=total,
            mean=total / count,
            min=min(counts),
            p50=ranks[50],
            p90=ranks[90],
            p95=ranks[95],
            p99=ranks[99],
            max=max(counts),
            bins=binned(counts, ranks[99]),
        )


def nearest_ranks(counts: Mapping[int, int], percents: tuple[int, ...]) -> dict[int, int]:
    """Percentile → the least value that is not below that share of all values (R. Hyndman, Y. Fan 1996, type 1)."""
    total = sum(counts.values())
    wanted = {percent: -(-percent * total // 100) for percent in percents}
    found: dict[int, int] = {}
    seen = 0
    for value in sorted(counts):
        seen += counts[value]
        found |= {percent: value for percent, rank in wanted.items() if rank <= seen and percent not in found}
    return found


def binned(counts: Mapping[int, int], tail: int) -> list[Bin]:
    """About 2 n^(1/3) bins for n values (Rice's rule), at most `MOST_BINS`, of one round width.

    What lies above the bin that holds `tail` shares one open bin.
    """
    lowest, highest = min(counts), max(counts)
    wanted = min(MOST_BINS, 2 * math.cbrt(sum(counts.values())))
    width = round_width((tail - lowest + 1) / wanted)
    first, last = lowest // width, min(tail // width, highest // width)
    sizes = [0] * (last - first + 1)
    above = 0
    for value, times in counts.items():
        if value // width > last:
            above += times
        else:
            sizes[value // width - first] += times
    bins = [Bin(start=(first + i) * width, end=(first + i + 1) * width, count=size) for i, size in enumerate(sizes)]
    return [*bins, Bin(start=(last + 1) * width, end=None, count=above)] if above else bins


def round_width(rough: float) -> int:
    """The least of 1, 2, 5, 10, 20, 50, … that is not below `rough`."""
    power: int = 10 ** math.floor(math.log10(max(rough, 1)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)


class StatisticsSpec(BaseModel):
    """What is asked about a dataset; tokens need a model."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    data: str = Field(description="Name of a dataset.")
    model: str | None = Field(None, description="`starter`, a local folder, a registered name or a Hugging Face id.")
    template: str | None = Field(None, description="Chat template for a base without one: `chatml` or `plain`.")
    max_seq_length: int = Field(2048, ge=8, description="Tokens; never more than the model's context.")


class StatisticsInputs(BaseModel):
    """Absolute paths that a statistics spec resolved to."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_folder: str
    examples_files: dict[Part, str]
    tokens_folder: str


class PartTokens(BaseModel):
    """Tokens of a part as training renders them, before anything is cut."""

    tokens: Distribution = Field(description="Tokens of an example.")
    trained: Distribution = Field(description="Of those, tokens that carry loss.")
    over: int = Field(description="Examples above max_tokens.")
    over_tokens: int = Field(description="Their tokens above it.")
    failed_checks: dict[CheckName, int] = Field(description="Examples that fail a check, as training has them.")

    @property
    def trained_share(self) -> float:
        return self.trained.total / self.tokens.total


class TokenStatistics(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model: str
    max_tokens: int = Field(description="The lesser of max_seq_length and the model's context.")
    context: int | None
    parts: dict[Part, PartTokens]
    store_bytes: int = Field(description="Of the token stores that training reads.")


class PartContent(BaseModel):
    """What a part's examples say. A turn is a message that is no system prompt; a text is one turn without a prompt."""

    examples: int
    turns: Distribution
    prompt_characters: Distribution
    answer_characters: Distribution
    roles: dict[str, int]
    languages: dict[str, int] | None = Field(description="Answers by ISO 639-1 code; None without py3langid.")
    languages_of: int = Field(description="Examples whose language was looked at, evenly spaced.")
    labels: dict[str, int] | None = Field(description="Examples of each label, for classification; most first.")


class DatasetStatistics(BaseModel):
    """`lorasmith data stats`."""

    dataset: str
    sha256: str
    format: DatasetFormat
    fates: dict[Fate, int] = Field(description="Input rows of each fate, duplicates among them.")
    parts: dict[Part, PartContent] = Field(description="Those that hold examples.")
    tokens: TokenStatistics | None = None
    estimate: Estimate | None = None
