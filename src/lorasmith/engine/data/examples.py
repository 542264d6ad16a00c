"""Read a dataset part and turn it into ids and labels, within the model's context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.rendering import RenderedExample, prompt_ids, render_example
from lorasmith.errors import InvalidData, InvalidSpec, NotFound
from lorasmith.schemas.data import Example

CHECKED_PROMPTS = 100


def read_examples(path: Path) -> list[Example]:
    """The examples of a JSONL file. Raises `InvalidData` naming the file, the line and the field."""
    if not path.is_file():
        raise NotFound(f"no examples file {path}")
    examples = []
    with path.open(encoding="utf-8") as handle:
        for number, line in enumerate(handle, start=1):
            try:
                examples.append(Example.model_validate_json(line))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                field = ".".join(str(part) for part in first["loc"]) or "the line"
                raise InvalidData(f"{path}, line {number}: {field}: {first['msg']}") from error
    return examples


@dataclass(frozen=True)
class RenderedPart:
    """Rows that fit, and how many were cut or left out to make them fit."""

    rows: list[RenderedExample]
    cut: int
    dropped: int

    @property
    def trained_tokens(self) -> int:
        return sum(row.trained_tokens for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)


def render_part(
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    stop_ids: set[int],
    *,
    max_tokens: int,
    too_long: Literal["error", "cut", "drop"],
) -> RenderedPart:
    """Render and check each row.

    Raises `InvalidSpec` when a row is too long and the policy is `error`, and `InvalidData` when a row has no trained
    token left or when training and serving would see different prompts.
    """
    rendered = [render_example(tokenizer, example, stop_ids) for example in examples]
    check_prompts(tokenizer, examples[:CHECKED_PROMPTS], rendered)
    long = [row for row in rendered if len(row.ids) > max_tokens]
    if long and too_long == "error":
        longest = max(long, key=lambda row: len(row.ids))
        raise InvalidSpec(
            f"{len(long)} of {len(rendered)} rows are longer than {max_tokens} tokens; the longest, row {longest.row}, "
            f"has {len(longest.ids)}",
            hint="--set training.too_long=cut or =drop, or a larger --set training.max_seq_length if the model allows it",
        )
    if too_long == "drop":
        kept = [row for row in rendered if len(row.ids) <= max_tokens]
    else:
        kept = [replace(row, ids=row.ids[:max_tokens], trained=row.trained[:max_tokens]) for row in rendered]
    for row in kept:
        if row.trained_tokens == 0:
            raise InvalidData(
                f"row {row.row} has no trained token within {max_tokens} tokens: its prompt alone is longer",
                hint="--set training.too_long=drop, or a larger --set training.max_seq_length",
            )
    if not kept:
        raise InvalidData(f"no row is left: all {len(rendered)} are longer than {max_tokens} tokens")
    return RenderedPart(kept, cut=len(long) if too_long == "cut" else 0, dropped=len(rendered) - len(kept))


def check_prompts(tokenizer: PreTrainedTokenizerBase, examples: list[Example], rendered: list[RenderedExample]) -> None:
    """What a server would feed before the last answer must be the ids that training saw there."""
    for example, row in zip(examples, rendered, strict=False):
        if example.messages is None:
            continue
        served = prompt_ids(tokenizer, example.prompt_messages())
        if row.ids[: len(served)] != served:
            raise InvalidData(
                f"row {row.row}: the prompt has other token ids in training than when it is served",
                hint="the template does not separate turns with special tokens; choose one that does with --template",
            )
