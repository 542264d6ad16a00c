"""Turn a dataset part into the rows that a run computes with: checked, and within the model's context."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.checks import ALL_CHECKS, CheckFailed, failure_of, overriding
from lorasmith.engine.data.rendering import RenderedExample, render_examples
from lorasmith.engine.data.rows import ChosenRows, Rows, RowsInMemory, StoredRows
from lorasmith.engine.data.token_store import checks_of
from lorasmith.engine.data.tokenizing import tokenized
from lorasmith.engine.data.truncation import Fitted, Rendering, fit
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.schemas.data import CheckName, Example, TooLong


@dataclass(frozen=True)
class RenderedPart:
    """Rows that fit, and what happened to the others: rows cut or split to fit, tokens cut, rows left out."""

    rows: ChosenRows
    given: int
    cut: int
    cut_tokens: int
    split: int
    dropped: int
    overridden: Counter[CheckName]

    @property
    def trained_tokens(self) -> int:
        return int(self.rows.trained.sum())

    @property
    def tokens(self) -> int:
        return int(self.rows.lengths.sum())

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


def stored_part(
    examples_file: Path,
    tokens_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: set[int],
    report: Reporter,
    *,
    max_tokens: int,
    too_long: TooLong,
    allow: Collection[CheckName] = (),
    may_be_empty: bool = False,
) -> RenderedPart:
    """The part of a file of examples through the token store below that folder, as `render_part` gives it."""
    store = tokenized(examples_file, tokens_folder, tokenizer, stop_ids, report)
    how = Rendering(tokenizer, stop_ids, max_tokens, allow)
    return fit_part(how, StoredRows(store, examples_file), too_long, may_be_empty=may_be_empty)


def render_part(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    stop_ids: set[int],
    *,
    max_tokens: int,
    too_long: TooLong,
    allow: Collection[CheckName] = (),
    may_be_empty: bool = False,
) -> RenderedPart:
    """Render, check and fit each row, in memory.

    Raises `CheckFailed` for the first check that a row fails and `allow` does not name, with the number of such rows,
    `InvalidSpec` when a row is too long and the policy is `error`, and `InvalidData` when no row is left, unless
    `may_be_empty`.
    """
    rows = RowsInMemory(examples, render_examples(tokenizer, examples, stop_ids, ALL_CHECKS))
    return fit_part(Rendering(tokenizer, stop_ids, max_tokens, allow), rows, too_long, may_be_empty=may_be_empty)


@dataclass(frozen=True)
class RowOutcome:
    """Of a row that is not trained as it stands: the examples it became and the tokens cut from them, or why not."""

    examples: int = 0
    cut_tokens: int = 0
    refused: str | None = None


@dataclass
class Fitting:
    """What became of rows that are not trained as they stand. `pieces` name the index of their row, in order."""

    pieces: list[tuple[int, RenderedExample]] = field(default_factory=list)
    outcomes: dict[int, RowOutcome] = field(default_factory=dict)
    overridden: Counter[CheckName] = field(default_factory=Counter)
    first_failure: CheckFailed | None = None
    failures: Counter[CheckName] = field(default_factory=Counter)
    refused: list[int] = field(default_factory=list)

    def add(self, index: int, fitted: list[Fitted]) -> None:
        """The examples that one row became."""
        self.pieces += [(index, piece.row) for piece in fitted]
        self.outcomes[index] = RowOutcome(len(fitted), sum(piece.cut for piece in fitted))

    def refuse(self, index: int, why: str) -> None:
        self.outcomes[index] = RowOutcome(refused=why)


def fit_part(how: Rendering, rows: Rows, too_long: TooLong, *, may_be_empty: bool = False) -> RenderedPart:
    """The rows that fit, and the others as the policy has them. Only those that do not fit are rendered again."""
    fitting = Fitting()
    whole = whole_rows(how, rows, fitting)
    for index in np.flatnonzero(~whole).tolist():
        fit_row(how, rows, index, too_long, fitting)
    return fitted_part(how, rows, whole, fitting, may_be_empty=may_be_empty)


def whole_rows(how: Rendering, rows: Rows, fitting: Fitting) -> NDArray[np.bool_]:
    """Which rows (rows,) are trained as they stand; each other one is for `fit_row`."""
    whole: NDArray[np.bool_] = (rows.lengths <= how.max_tokens) & (rows.trained > 0)
    for packed in np.unique(rows.failed[whole]).tolist():
        failing = whole & (rows.failed == packed)
        if all(check in how.allow for check in checks_of(packed)):
            fitting.overridden.update(dict.fromkeys(checks_of(packed), int(failing.sum())))
        else:
            whole &= ~failing
    return whole


def fitted_part(
    how: Rendering, rows: Rows, whole: NDArray[np.bool_], fitting: Fitting, *, may_be_empty: bool
) -> RenderedPart:
    """What is trained. Raises for rows that stop a run: see `render_part`."""
    given = len(rows.lengths)
    if fitting.first_failure is not None:
        raise failure_of(fitting.first_failure, fitting.failures, given)
    if fitting.refused:
        longest = max(fitting.refused, key=lambda index: int(rows.lengths[index]))
        raise InvalidSpec(
            f"{len(fitting.refused)} of {given} rows are longer than {how.max_tokens} tokens; the longest, row "
            f"{rows.row(longest).row}, has {rows.lengths[longest]}",
            hint="--set training.too_long=right, =left, =split or =drop (`lorasmith data preview … --labels` shows what "
            "each cuts), or a larger --set training.max_seq_length if the model allows it",
        )
    chosen = chosen_rows(rows, np.flatnonzero(whole), fitting.pieces)
    if not len(chosen) and not may_be_empty:
        raise InvalidData(f"no row is left: all {given} are longer than {how.max_tokens} tokens or train nothing")
    outcomes = fitting.outcomes.values()
    return RenderedPart(
        rows=chosen,
        given=given,
        cut=sum(row.cut_tokens > 0 for row in outcomes),
        cut_tokens=sum(row.cut_tokens for row in outcomes),
        split=sum(row.examples > 1 for row in outcomes),
        dropped=sum(row.examples == 0 for row in outcomes),
        overridden=fitting.overridden,
    )


def fit_row(how: Rendering, rows: Rows, index: int, too_long: TooLong, fitting: Fitting) -> None:
    """One row that is too long, trains nothing or fails a check that is not overridden."""
    row = rows.row(index)
    refused = next((check for check in row.overridden if check not in how.allow), None)
    if refused and fitting.first_failure is not None:
        fitting.failures[refused] += 1  # rendered again for the sentence of the first one alone
        fitting.refuse(index, f"check `{refused}`")
        return
    try:
        if refused:
            row = how.render(rows.example(index))
        if too_long == "error" and not how.fits(row):
            fitting.refused.append(index)
            fitting.refuse(index, "too_long is error")
            return
        fitted = trained_ones(how, fit(how, rows.example(index), row, too_long))
    except CheckFailed as failure:
        if failure.check not in how.allow:
            fitting.first_failure = fitting.first_failure or failure
            fitting.failures[failure.check] += 1
            fitting.refuse(index, f"{failure.sentence} (check `{failure.check}`)")
            return
        fitting.overridden[failure.check] += 1
        fitted = []
    else:
        fitting.overridden.update(row.overridden)
    fitting.add(index, fitted)


def chosen_rows(rows: Rows, whole: NDArray[np.int64], pieces: list[tuple[int, RenderedExample]]) -> ChosenRows:
    """Whole rows and pieces in the order of the rows that they come from."""
    sources = np.concatenate([whole, np.array([index for index, _ in pieces], np.int64)])
    places = np.concatenate([whole, -1 - np.arange(len(pieces))])
    return ChosenRows(rows, places[np.argsort(sources, kind="stable")], [piece for _, piece in pieces])


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
