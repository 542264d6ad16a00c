"""The pass of an import that takes near duplicates out, between reading the rows and assigning the parts."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lorasmith.files import disk_errors
from lorasmith.schemas.data import STAYS, Example, Fate, LedgerLine, Part
from lorasmith.services.data_duplicates.clusters import components
from lorasmith.services.data_duplicates.examples import row_of
from lorasmith.services.data_duplicates.index import write_index
from lorasmith.services.data_duplicates.search import Decision, decide
from lorasmith.services.data_duplicates.shingles import I64, U64
from lorasmith.services.data_duplicates.texts import Row, digest
from lorasmith.services.data_index import ImportIndex
from lorasmith.services.data_parts import lines
from lorasmith.services.data_progress import REPORT_EVERY_ROWS, Progress, Report
from lorasmith.services.data_split import group_position

SEARCH = "near-duplicates"


@dataclass
class Sifted:
    """Files without the near duplicates, and what that changes in the counts of the import."""

    rows: Path
    ledger: Path
    fates: Counter[str] = field(default_factory=Counter)  # to be added; negative for fates that rows had before
    findings_gone: Counter[str] = field(default_factory=Counter)
    pinned: Counter[Part] = field(default_factory=Counter)


def sift(rows: Path, ledger: Path, index: ImportIndex, threshold: float, salt: str, report: Report) -> Sifted:
    """Give each near duplicate its fate, and make the groups of the index anew from the rows that stay.

    Rows of one cluster or with one instruction get one group, and with it everything that is in their groups, so that
    none of it falls into two parts. `rows` and `ledger` are left as they are: an import that is stopped here starts
    the pass again.
    """
    groups = array("Q")
    decision = decide(write_index(rows_to_compare(rows, groups, report), rows.parent / SEARCH, replace=True), threshold)
    leaders = leading_rows(decision, np.frombuffer(groups, np.uint64))
    result = Sifted(rows.with_suffix(".sifted"), ledger.with_suffix(".sifted"))
    index.clear_groups()
    ids = decision.index.id
    names = dict.fromkeys(np.flatnonzero(np.bincount(leaders) > 1).tolist(), "")  # of leaders that others follow
    position = 0
    with (
        disk_errors(rows),
        result.rows.open("w", encoding="utf-8", newline="\n") as kept_rows,
        result.ledger.open("w", encoding="utf-8", newline="\n") as new_ledger,
    ):
        examples = map(Example.model_validate_json, lines(rows))
        for text in lines(ledger):
            line = LedgerLine.model_validate_json(text)
            if line.fate in STAYS:
                example = next(examples)
                leader, stand_in = int(leaders[position]), int(decision.of[position])
                if leader == position and leader in names:
                    names[leader] = example.group
                if stand_in == position:
                    example.group = names.get(leader, example.group)
                    index.add_to_group(example.group, group_position(example.group, salt), line.part)
                    if line.part is not None:
                        result.pinned[line.part] += 1
                    kept_rows.write(example.model_dump_json(exclude_none=True) + "\n")
                else:
                    result.fates.update({Fate.NEAR_DUPLICATE.value: 1, line.fate.value: -1})
                    result.findings_gone.update({finding.check for finding in line.flags or ()})
                    via = int(decision.via[position])
                    line = near_duplicate(
                        line,
                        int(ids[stand_in]),
                        float(decision.similarity[position]),
                        int(ids[via]) if via >= 0 else None,
                    )
                    text = line.model_dump_json(exclude_none=True) + "\n"
                position += 1
            new_ledger.write(text)
    return result


def rows_to_compare(rows: Path, groups: array[int], report: Report) -> Iterator[Row]:
    """The rows; `groups` receives a digest of each one's group."""
    for number, text in enumerate(lines(rows), start=1):
        example = Example.model_validate_json(text)
        groups.append(int.from_bytes(digest(example.group, 8), "little"))
        yield row_of(example)
        if number % REPORT_EVERY_ROWS == 0:
            report(Progress("comparing", number, number, example.row))


def leading_rows(decision: Decision, groups: U64) -> I64:
    """For each position the first one of those that must fall into one part with it."""
    positions = np.arange(len(groups))
    names, number = np.unique(groups, return_inverse=True)
    same_instruction = np.where(decision.group >= 0, decision.group, positions)
    joined = components(
        len(names),
        np.concatenate([number, number]),
        np.concatenate([number[decision.of], number[same_instruction]]),
    )[number]
    first = np.full(len(names), len(groups))
    np.minimum.at(first, joined, positions)
    return first[joined]


def near_duplicate(line: LedgerLine, kept: int, similarity: float, via: int | None) -> LedgerLine:
    through = f", and nearer to row {via} of its cluster" if via is not None else ""
    return LedgerLine(
        row=line.row,
        file=line.file,
        line=line.line,
        fate=Fate.NEAR_DUPLICATE,
        duplicate_of_row=kept,
        similarity=similarity,
        tokens=line.tokens,
        language=line.language,
        reason=f"similarity {similarity:.2f} with row {kept}{through}",
    )
