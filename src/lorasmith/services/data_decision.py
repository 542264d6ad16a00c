"""What is decided between rows that were read: which are taken out, and the part of each that stays.

An import does this after reading; `data dedup` and `data split` do it again for rows that were read before. The outcome
depends on the rows and the options alone, so deciding again with the options of before gives the dataset of before.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import InvalidSpec
from lorasmith.schemas.data import DataPreparationSpec, DatasetFormat, Fate, Part
from lorasmith.services.data_parts import NearDuplicateAt, ReadRows, walk, write_parts
from lorasmith.services.data_progress import Report
from lorasmith.services.data_split import assign_parts


@dataclass(frozen=True)
class DecidedRows:
    statistics: dict[str, Any]
    part_sizes: dict[Part, int]
    fates: Counter[str]


def decide_rows(
    folder: Path, read: ReadRows, spec: DataPreparationSpec, index_folder: Path, report: Report
) -> DecidedRows:
    """The parts, the whole ledger and what is set aside into `folder`.

    Where near duplicates are taken out, `index_folder` is the index of the rows, written if it is not there; it takes
    about 1 KB a row, and deciding holds a few numbers a row in memory. All else holds one row in memory.
    """
    near_duplicate_at: NearDuplicateAt | None = None
    pinned = read.pinned
    if spec.near_duplicates is not None:
        from lorasmith.services import data_near_duplicates  # it imports numpy

        decision = data_near_duplicates.decide_near_duplicates(read, index_folder, spec.near_duplicates, report)
        near_duplicate_at = data_near_duplicates.removals(decision)
        pinned = data_near_duplicates.group_again(read, decision, spec.salt)
    labelled = labelled_groups(read, near_duplicate_at) if spec.stratify else None
    note = assign_parts(read.index, pinned, spec, labelled)
    written = write_parts(folder, read, near_duplicate_at, report)
    findings = read.findings - written.findings_gone
    fates = Counter(read.fates)
    fates.update(written.fates)
    statistics = written.statistics.result()
    statistics["ignored_fields"] = dict(read.ignored)
    if findings:
        statistics["flags"] = dict(findings.most_common())
    if read.languages:
        statistics["languages"] = dict(read.languages)
    if note:
        statistics["split_note"] = note
    return DecidedRows(statistics, written.statistics.part_sizes(), fates)


def labelled_groups(read: ReadRows, near_duplicate_at: NearDuplicateAt | None) -> Iterator[tuple[str, str]]:
    """Group and label of each row that stays."""
    for _, example, removal in walk(read, near_duplicate_at):
        if example is not None and removal is None:
            values = json.loads(example)
            label = values["desirable"] if "desirable" in values else values["messages"][-1]["content"]
            yield read.index.joined_group(values["group"]), str(label)


def check_decision(spec: DataPreparationSpec, format: DatasetFormat, where: str) -> None:
    """Raise `InvalidSpec` for a decision that rows of this format do not allow. `where` names them."""
    if spec.near_duplicates is not None and format.kind != "sft":
        raise InvalidSpec(
            f"near duplicates are taken out of rows with one answer, and the rows of {where} ({format}) "
            "say which of two answers is wanted: similar rows may say the opposite",
            hint="leave the threshold out; lorasmith data duplicates NAME shows what is similar",
        )
    if spec.stratify and format not in (DatasetFormat.CLASSIFICATION, DatasetFormat.KTO):
        raise InvalidSpec(
            f"--stratify label needs rows with a label (format classification or kto), and {where} has the format "
            f"{format}",
            hint="import it with --format classification if its answers are labels, or leave --stratify out",
        )


def fate_counts(fates: Mapping[Any, int]) -> dict[Fate, int]:
    """In the order of `Fate`, those that a reader always looks for and those that occur."""
    always = (Fate.KEPT, Fate.EXACT_DUPLICATE, Fate.REJECTED)
    return {fate: fates.get(fate, 0) for fate in Fate if fate in always or fates.get(fate, 0)}
