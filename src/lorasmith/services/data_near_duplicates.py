"""The pass that takes near duplicates out, between reading the rows and assigning the parts."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lorasmith.schemas.data import Example, Fate
from lorasmith.services.data_duplicates.clusters import components
from lorasmith.services.data_duplicates.examples import row_of
from lorasmith.services.data_duplicates.index import open_index, write_index
from lorasmith.services.data_duplicates.search import Decision, decide
from lorasmith.services.data_duplicates.shingles import I64, U64
from lorasmith.services.data_duplicates.texts import Row, digest
from lorasmith.services.data_parts import NearDuplicateAt, ReadRows, Removal, lines
from lorasmith.services.data_progress import REPORT_EVERY_ROWS, Progress, Report


def decide_near_duplicates(read: ReadRows, index_folder: Path, threshold: float, report: Report) -> Decision:
    """The fate of each row with an example, by its position. Rows are hashed where `index_folder` is not there yet."""
    if not index_folder.exists():
        write_index(rows_to_compare(read.rows, report), index_folder)
    return decide(open_index(index_folder), threshold)


def rows_to_compare(rows: Path, report: Report) -> Iterator[Row]:
    for number, text in enumerate(lines(rows), start=1):
        example = Example.model_validate_json(text)
        yield row_of(example)
        if number % REPORT_EVERY_ROWS == 0:
            report(Progress("comparing", number, number, example.row))


def removals(decision: Decision) -> NearDuplicateAt:
    ids = decision.index.id

    def near_duplicate_at(position: int) -> Removal | None:
        stand_in, via = int(decision.of[position]), int(decision.via[position])
        if stand_in == position:
            return None
        kept, similarity = int(ids[stand_in]), float(decision.similarity[position])
        through = f", and nearer to row {int(ids[via])} of its cluster" if via >= 0 else ""
        reason = f"similarity {similarity:.2f} with row {kept}{through}"
        return Removal(Fate.NEAR_DUPLICATE, reason, duplicate_of_row=kept, similarity=similarity)

    return near_duplicate_at


def joined_groups(decision: Decision, rows: Path) -> Iterator[str]:
    """For each row the group that it is split by: rows of one cluster or with one instruction get one group, and with
    it everything that is in their groups, named after the first of these rows."""
    groups = array("Q")
    for text in lines(rows):
        groups.append(int.from_bytes(digest(Example.model_validate_json(text).group, 8), "little"))
    leaders = leading_rows(decision, np.frombuffer(groups, np.uint64))
    names = dict.fromkeys(np.flatnonzero(np.bincount(leaders) > 1).tolist(), "")  # of leaders that others follow
    for position, text in enumerate(lines(rows)):
        own, leader = Example.model_validate_json(text).group, int(leaders[position])
        if leader == position and leader in names:
            names[leader] = own
        yield names.get(leader, own)


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
