"""Read a dataset part and turn it into ids and labels, within the model's context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.checks import CheckFailed, failure_of, overriding
from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.data.truncation import Fitted, Rendering, fit
from lorasmith.errors import InvalidData, InvalidSpec, NotFound
from lorasmith.schemas.data import CheckName, Example, TooLong


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


@dataclass
class RenderedPart:
    """Rows that fit, and what happened to the others: rows cut or split to fit, tokens cut, rows left out."""

    rows: list[RenderedExample] = field(default_factory=list)
    given: int = 0
    cut: int = 0
    cut_tokens: int = 0
    split: int = 0
    dropped: int = 0
    overridden: Counter[CheckName] = field(default_factory=Counter)

    @property
    def trained_tokens(self) -> int:
        return sum(row.trained_tokens for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    def counts(self) -> dict[str, int]:
        """Of the event `rows`."""
        return {
            "cut": self.cut,
            "cut_tokens": self.cut_tokens,
            "split": self.split,
            "dropped": self.dropped,
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
        }

    def warnings(self) -> list[str]:
        """One sentence for each check that failed and is overridden."""
        return overriding(self.overridden, self.given)

    def add(self, fitted: list[Fitted]) -> None:
        """The examples that one row became."""
        self.rows += [piece.row for piece in fitted]
        cut_tokens = sum(piece.cut for piece in fitted)
        self.cut += cut_tokens > 0
        self.cut_tokens += cut_tokens
        self.split += len(fitted) > 1
        self.dropped += not fitted


def render_part(
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    stop_ids: set[int],
    *,
    max_tokens: int,
    too_long: TooLong,
    allow: Collection[CheckName] = (),
) -> RenderedPart:
    """Render, check and fit each row.

    Raises `CheckFailed` for the first check that a row fails and `allow` does not name, with the number of such rows,
    and `InvalidSpec` when a row is too long and the policy is `error`.
    """
    how = Rendering(tokenizer, stop_ids, max_tokens, allow)
    part = RenderedPart(given=len(examples))
    failures: list[CheckFailed] = []
    refused: list[RenderedExample] = []
    for example in examples:
        try:
            row = how.render(example)
            if too_long == "error" and not how.fits(row):
                refused.append(row)
                continue
            fitted = trained_ones(how, fit(how, example, row, too_long))
        except CheckFailed as failure:
            if failure.check not in allow:
                failures.append(failure)
                continue
            part.overridden[failure.check] += 1
            fitted = []
        else:
            part.overridden.update(row.overridden)
        part.add(fitted)
    if failures:
        raise failure_of(failures, len(examples))
    if refused:
        longest = max(refused, key=lambda row: len(row.ids))
        raise InvalidSpec(
            f"{len(refused)} of {len(examples)} rows are longer than {max_tokens} tokens; the longest, row "
            f"{longest.row}, has {len(longest.ids)}",
            hint="--set training.too_long=right, =left, =split or =drop (`lorasmith data preview … --labels` shows what "
            "each cuts), or a larger --set training.max_seq_length if the model allows it",
        )
    if not part.rows:
        raise InvalidData(f"no row is left: all {len(examples)} are longer than {max_tokens} tokens or train nothing")
    return part


def trained_ones(how: Rendering, fitted: list[Fitted]) -> list[Fitted]:
    """The same. Raises `CheckFailed` when an example carries no loss."""
    for piece in fitted:
        if piece.row.trained_tokens == 0:
            raise CheckFailed(
                "no-trained-token",
                piece.whole.row,
                f"no trained token within {how.max_tokens} tokens: no answer is left",
            )
    return fitted
