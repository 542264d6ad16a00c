"""The rows of a dataset as they were read, and the last pass over them: to the file of a part, or set aside."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

from lorasmith.files import disk_errors
from lorasmith.interrupts import between_interrupts
from lorasmith.schemas.data import CONTENT_FIELDS, PARTS, STAYS, Example, Fate, LedgerLine, Part, SetAside
from lorasmith.services.data_digests import canonical_json
from lorasmith.services.data_index import ImportIndex
from lorasmith.services.data_progress import REPORT_EVERY_ROWS, Progress, Report
from lorasmith.services.data_statistics import PartStatistics

LEDGER = "ledger.jsonl"
SET_ASIDE = "set_aside.jsonl"
INDEXES = "duplicates"


@dataclass(frozen=True)
class ReadRows:
    """What a source was read to, before anything is decided between its rows.

    `rows` has one example for each line of `ledger` that stays, in its order. `index` holds the groups of those without
    `leaks_into`, `pinned` how many of them ask for each part. The counters are of all lines, `findings` of those that stay.
    """

    rows: Path
    ledger: Path
    index: ImportIndex
    num_rows: int
    fates: Counter[str]
    findings: Counter[str]
    pinned: Counter[Part]
    ignored: Mapping[str, int] = field(default_factory=dict)
    languages: Mapping[str, int] = field(default_factory=dict)


class Removal(NamedTuple):
    """Why a row that could stay does not; the fields are those of its ledger line."""

    fate: Fate
    reason: str
    duplicate_of_row: int | None = None
    similarity: float | None = None
    leaks_into: str | None = None


class ReadRow(NamedTuple):
    """A ledger line as it was read. `example` is its example as JSON, where it has one."""

    line: LedgerLine
    example: str | None
    removal: Removal | None


NearDuplicateAt = Callable[[int], Removal | None]  # of the position among the rows that have an example


def walk(read: ReadRows, near_duplicate_at: NearDuplicateAt | None = None) -> Iterator[ReadRow]:
    """Every line of the ledger, in the order of the input rows."""
    examples = enumerate(lines(read.rows))
    for text in lines(read.ledger):
        line = LedgerLine.model_validate_json(text)
        if line.fate not in STAYS:
            yield ReadRow(line, None, None)
            continue
        position, example = next(examples)
        if line.leaks_into is not None:
            yield ReadRow(line, example, Removal(Fate.LEAKS, f"holds {line.leaks_into}", leaks_into=line.leaks_into))
        else:
            yield ReadRow(line, example, near_duplicate_at(position) if near_duplicate_at else None)


@dataclass
class WrittenParts:
    """What stays, and what the removals change in the counts of the ledger: negative for what rows had before."""

    statistics: PartStatistics
    fates: Counter[str] = field(default_factory=Counter)
    findings_gone: Counter[str] = field(default_factory=Counter)


def write_parts(
    folder: Path, read: ReadRows, near_duplicate_at: NearDuplicateAt | None, report: Report
) -> WrittenParts:
    """Parts, ledger and what is set aside into `folder`; the groups of the index have their parts."""
    written = WrittenParts(PartStatistics())
    with (
        disk_errors(folder),
        open_parts(folder) as files,
        open_text(folder / SET_ASIDE) as set_aside,
        open_text(folder / LEDGER) as ledger,
    ):
        for line, example, removal in between_interrupts(walk(read, near_duplicate_at)):
            if removal is not None:
                assert example is not None
                aside = SetAside(line=line, example=Example.model_validate_json(example))
                set_aside.write(aside.model_dump_json(exclude_none=True) + "\n")
                written.fates.update({removal.fate.value: 1, line.fate.value: -1})
                written.findings_gone.update({finding.check for finding in line.flags or ()})
                line = removed(line, removal)
            elif example is not None:
                values = json.loads(example)
                group = read.index.joined_group(values["group"])
                if group != values["group"]:
                    line.own_group = values["group"]
                    example = regrouped(example, group)
                line.part = line.asked_part or read.index.part_of(group)
                files[line.part].write(example)
                written.statistics.add(values, line.part)
            ledger.write(line.model_dump_json(exclude_none=True) + "\n")
            if line.row % REPORT_EVERY_ROWS == 0:
                report(Progress("writing", line.row, read.num_rows, read.num_rows))
    if not (folder / SET_ASIDE).stat().st_size:
        (folder / SET_ASIDE).unlink()
    return written


def regrouped(example: str, group: str) -> str:
    changed = Example.model_validate_json(example).model_copy(update={"group": group})
    return changed.model_dump_json(exclude_none=True) + "\n"


def removed(line: LedgerLine, removal: Removal) -> LedgerLine:
    return LedgerLine(
        row=line.row, file=line.file, line=line.line, tokens=line.tokens, language=line.language, **removal._asdict()
    )


@contextmanager
def open_parts(folder: Path) -> Iterator[dict[Part, IO[str]]]:
    """The files of the three parts, open for writing."""
    with ExitStack() as stack:
        yield {part: stack.enter_context(open_text(folder / f"{part}.jsonl")) for part in PARTS}


def content_digest(folder: Path) -> str:
    """sha256 over the content of the parts in order; row numbers and groups do not count."""
    digest = hashlib.sha256()
    for part in PARTS:
        for line in lines(folder / f"{part}.jsonl"):
            content = {key: value for key, value in json.loads(line).items() if key in CONTENT_FIELDS}
            digest.update(canonical_json([part, content]) + b"\n")
    return digest.hexdigest()


def index_of_rows(folder: Path) -> Path:
    """Where the version in which rows were read keeps their search index, for all rows that anything is decided of."""
    return folder / INDEXES / "whole-rows"


def open_text(path: Path) -> IO[str]:
    return path.open("w", encoding="utf-8", newline="\n")


def lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as handle:
        yield from handle
