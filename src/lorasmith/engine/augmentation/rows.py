"""`rows.jsonl`: what became of each source row, one line when the teacher is done with it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from lorasmith.files import append_lines, cut_torn_line
from lorasmith.schemas.augmentation import AugmentationMethod, AugmentedRow
from lorasmith.schemas.data import Example, Message

ROWS = "rows.jsonl"


class RowBook:
    """The rows of a job, of which a resumed one asks for those that are missing or have failed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / ROWS
        self.fates: dict[str, str] = {}
        cut_torn_line(self.path)
        if self.path.exists():
            with self.path.open(encoding="utf-8", newline="\n") as lines:
                for text in lines:
                    line = AugmentedRow.model_validate_json(text)
                    self.fates[line.example_id] = line.fate

    def add(self, line: AugmentedRow) -> None:
        append_lines(self.path, [line.model_dump_json(exclude_none=True)])
        self.fates[line.example_id] = line.fate

    def is_done(self, example: Example) -> bool:
        return self.fates.get(example.id, "failed") != "failed"

    def finished(self) -> set[str]:
        """Ids of the examples that are not asked about again."""
        return {example_id for example_id, fate in self.fates.items() if fate != "failed"}

    def counts(self) -> dict[str, int]:
        found = Counter(self.fates.values())
        return {fate: found[fate] for fate in ("answered", "rejected", "failed", "skipped")}


def usable(path: Path, method: AugmentationMethod, max_rows: int | None) -> Iterator[Example]:
    """The rows of a part that the method can be used on, at most the first so many."""
    return islice((example for example in read_examples(path) if why_not(example, method) is None), max_rows)


def read_examples(path: Path) -> Iterator[Example]:
    with path.open(encoding="utf-8", newline="\n") as lines:
        yield from map(Example.model_validate_json, lines)


def why_not(example: Example, method: AugmentationMethod) -> str | None:
    """Why a row cannot be augmented in that way, or None."""
    if example.messages is None:
        return "a plain text has no request and no answer"
    if method.rewords:
        return None if request_of(example) else "it has no request"
    last = example.messages[-1]
    if last.role != "assistant" or last.tool_calls or not last.content.strip():
        return "it does not end with an answer in words"
    if last.weight == 0:
        return "its answer is read and not trained (weight 0)"
    if method is AugmentationMethod.NEGATIVE and example.tools:
        return "preferences hold no tools"
    return None


def request_of(example: Example) -> str:
    """The last user turn."""
    return next((message.content for message in reversed(example.messages or []) if message.role == "user"), "")


def before_request(example: Example) -> list[Message]:
    """The turns before the last user turn."""
    messages = example.messages or []
    last = max(index for index, message in enumerate(messages) if message.role == "user")
    return messages[:last]
