"""A file to canonical examples in parts, with one ledger line for each input row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import InvalidData
from lorasmith.schemas.data import (
    PARTS,
    DataPreparationSpec,
    Detection,
    Example,
    Fate,
    LedgerLine,
    Part,
)
from lorasmith.services.data_conversion import BadRow, convert, explicit_part, ignored_fields, normalised
from lorasmith.services.data_formats import detect_format
from lorasmith.services.data_reading import RawRow, read_rows
from lorasmith.services.data_split import split_examples

SHOWN_FINDINGS = 3
Content = str | tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class CuratedData:
    """What a file became. Examples stand in the order of their rows; `ledger` has one line for each input row."""

    detection: Detection
    parts: dict[Part, list[Example]]
    ledger: list[LedgerLine]
    statistics: dict[str, Any]

    @property
    def examples(self) -> list[Example]:
        return [example for part in PARTS for example in self.parts[part]]

    def fates(self) -> dict[Fate, int]:
        counts = Counter(line.fate for line in self.ledger)
        return {fate: counts[fate] for fate in Fate}

    def part_sizes(self) -> dict[Part, int]:
        return {part: len(self.parts[part]) for part in PARTS}


def curate(source: Path, spec: DataPreparationSpec) -> CuratedData:
    """Read, detect, convert, drop exact duplicates, split. Raises `InvalidData` when too many rows are bad."""
    rows = list(read_rows(source))
    detection = detect_format([row.values for row in rows], file=str(source), wanted=spec.format)
    ledger = Ledger(source)
    kept: list[Example] = []
    pinned: dict[int, Part] = {}
    ignored: Counter[str] = Counter()
    first_with: dict[Content, Example] = {}
    for row in rows:
        try:
            part = explicit_part(row.values)
            example = convert(row, detection.format)
        except BadRow as problem:
            ledger.reject(row, problem)
            continue
        ignored.update(ignored_fields(row.values, detection.format))
        first = first_with.setdefault(normalised_content(example), example)
        if first is not example:
            ledger.mark_duplicate(row, first)
            continue
        kept.append(example)
        ledger.keep(row, example)
        if part is not None:
            pinned[row.number] = part
    ledger.check(spec.max_rejected_share)
    split = split_examples(kept, pinned, spec)
    parts: dict[Part, list[Example]] = {part: [] for part in PARTS}
    for example in kept:
        parts[split.part_of_row[example.row]].append(example)
        ledger.lines[example.row - 1].part = split.part_of_row[example.row]
    statistics = describe_examples(kept)
    statistics["ignored_fields"] = dict(ignored.most_common())
    if split.note:
        statistics["split_note"] = split.note
    return CuratedData(detection, parts, ledger.lines, statistics)


class Ledger:
    """The fate of each row of one file, in the order of the rows."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.lines: list[LedgerLine] = []

    def keep(self, row: RawRow, example: Example) -> None:
        self.add(row, Fate.KEPT, example_id=example.id)

    def mark_duplicate(self, row: RawRow, first: Example) -> None:
        reason = f"same content as row {first.row}"
        self.add(row, Fate.EXACT_DUPLICATE, example_id=first.id, duplicate_of_row=first.row, reason=reason)

    def reject(self, row: RawRow, problem: BadRow) -> None:
        self.add(row, Fate.REJECTED, field=problem.field, reason=problem.message)

    def add(self, row: RawRow, fate: Fate, **details: Any) -> None:
        self.lines.append(LedgerLine(row=row.number, file=self.source.name, line=row.line, fate=fate, **details))

    def check(self, max_rejected_share: float) -> None:
        rejected = [line for line in self.lines if line.fate == Fate.REJECTED]
        share = len(rejected) / len(self.lines)
        if share <= max_rejected_share and len(rejected) < len(self.lines):
            return
        findings = [f"  {self.source}:{line.line}: row {line.row}, {line.reason}" for line in rejected[:SHOWN_FINDINGS]]
        if len(rejected) > SHOWN_FINDINGS:
            findings.append(f"  and {len(rejected) - SHOWN_FINDINGS} more")
        nothing_left = len(rejected) == len(self.lines)
        limit = "so nothing is left" if nothing_left else f"more than the allowed share of {max_rejected_share:g}"
        enough = max(0.05, math.ceil(share * 100) / 100)
        raise InvalidData(
            f"{len(rejected)} of {len(self.lines)} rows of {self.source} cannot be used, {limit}:\n"
            + "\n".join(findings),
            hint="mend the rows"
            if nothing_left
            else f"mend the rows, or leave them out, with a line each in the ledger: --max-rejected {enough:.2f}",
        )


def normalised_content(example: Example) -> Content:
    if example.messages is None:
        return normalised(example.text or "")
    return tuple((message.role, normalised(message.content)) for message in example.messages)


def describe_examples(examples: Sequence[Example]) -> dict[str, Any]:
    """Counts and lengths. A turn is a message that is no system prompt; a text is one turn without a prompt."""
    roles = Counter(message.role for example in examples for message in example.messages or ())
    turns = [sum(message.role != "system" for message in example.messages or ()) or 1 for example in examples]
    prompts = [prompt_length(example) for example in examples]
    answers = [len(example.answer()) for example in examples]
    return {
        "examples": len(examples),
        "turns": {"mean": round(sum(turns) / len(turns), 2), "max": max(turns)},
        "characters": {"prompt": describe_lengths(prompts), "answer": describe_lengths(answers)},
        "roles": dict(roles),
    }


def prompt_length(example: Example) -> int:
    return sum(len(message.content) for message in example.prompt_messages()) if example.messages else 0


def describe_lengths(lengths: Sequence[int]) -> dict[str, float]:
    """Mean, median, 95th percentile (nearest rank) and maximum."""
    ordered = sorted(lengths)
    return {
        "mean": round(sum(ordered) / len(ordered), 1),
        "p50": ordered[math.ceil(0.50 * len(ordered)) - 1],
        "p95": ordered[math.ceil(0.95 * len(ordered)) - 1],
        "max": ordered[-1],
    }
