"""Checks that stop a run before its first step: each has a name, a way out, and what overriding it by name does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import get_args

from lorasmith.errors import InvalidData
from lorasmith.schemas.data import CheckName

ALL_CHECKS: frozenset[CheckName] = frozenset(get_args(CheckName))


@dataclass(frozen=True)
class Check:
    """`mend` is the way out; `instead` says what a run does with the row when the check is overridden."""

    mend: str
    instead: str


CHECKS: dict[CheckName, Check] = {
    "stop-token-not-trained": Check(
        mend="choose a template whose answers end with the tokenizer's eos token: --template chatml",
        instead="train the answer without an end",
    ),
    "no-trained-token": Check(
        mend="a larger --set training.max_seq_length, or another --set training.too_long",
        instead="leave such rows out",
    ),
    "prompt-differs-when-served": Check(
        mend="the template does not separate turns with special tokens; choose one that does with --template",
        instead="train on the tokens as they are",
    ),
    "special-token-in-message": Check(
        mend="remove it from the text; turns are marked by the template",
        instead="read it as the special token",
    ),
    "template-rewrites-history": Check(
        mend="keep one answer per conversation, or choose --template",
        instead="train the last answer alone",
    ),
}


class CheckFailed(InvalidData):
    """One row fails one check; `sentence` says how."""

    def __init__(self, check: CheckName, row: int, sentence: str, *, share: str = "") -> None:
        super().__init__(f"row {row}: {sentence} (check `{check}`{share})", hint=way_out(check))
        self.check, self.row, self.sentence = check, row, sentence


def way_out(check: CheckName) -> str:
    return f"{CHECKS[check].mend}; or {CHECKS[check].instead}: --set 'training.allow=[{check}]'"


class RowChecks:
    """Fails the checks of one row, or notes those that are overridden."""

    def __init__(self, row: int, allow: Collection[CheckName] = ()) -> None:
        self.row = row
        self.allow = allow
        self.overridden: list[CheckName] = []

    def fail(self, check: CheckName, sentence: str) -> None:
        if check not in self.allow:
            raise CheckFailed(check, self.row, sentence)
        if check not in self.overridden:
            self.overridden.append(check)


def failure_of(first: CheckFailed, counts: Counter[CheckName], rows: int) -> CheckFailed:
    """One error for the failures of a part: the first row of the first check, how many rows, and the other checks."""
    others = "".join(f"; check `{check}` {count}" for check, count in counts.items() if check != first.check)
    return CheckFailed(
        first.check, first.row, first.sentence, share=f", failed by {counts[first.check]} of {rows} rows{others}"
    )


def overriding(counts: Counter[CheckName], rows: int) -> list[str]:
    """One sentence for each overridden check."""
    return [
        f"check `{check}` is overridden for {count} of {rows} rows: {CHECKS[check].instead}"
        for check, count in counts.items()
    ]
