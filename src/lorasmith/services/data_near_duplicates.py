"""The pass that takes near duplicates out, between reading the rows and assigning the parts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lorasmith.interrupts import between_interrupts
from lorasmith.schemas.data import Example, Fate, Part
from lorasmith.services.data_duplicates.clusters import components
from lorasmith.services.data_duplicates.examples import row_of
from lorasmith.services.data_duplicates.index import open_index, write_index
from lorasmith.services.data_duplicates.search import Decision, decide
from lorasmith.services.data_duplicates.shingles import I64, U64
from lorasmith.services.data_duplicates.texts import Row, digest
from lorasmith.services.data_parts import NearDuplicateAt, ReadRows, Removal, lines, walk
from lorasmith.services.data_progress import REPORT_EVERY_ROWS, Progress, Report
from lorasmith.services.data_split import group_position


def decide_near_duplicates(read: ReadRows, index_folder: Path, threshold: float, report: Report) -> Decision:
    """The fate of each row with an example, by its position. Rows are hashed where `index_folder` is not there yet."""
    if not index_folder.exists():
        write_index(rows_to_compare(read.rows, report), index_folder)
    return decide(open_index(index_folder), threshold)


def rows_to_compare(rows: Path, report: Report) -> Iterator[Row]:
    for number, text in enumerate(between_interrupts(lines(rows)), start=1):
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


def group_again(read: ReadRows, decision: Decision, salt: str) -> Counter[Part]:
    """Groups of the rows that stay, in the index instead: rows of one cluster or with one instruction get one group, and
    with it everything that is in their groups, named after the first of these rows.

    Returns how many of the rows ask for each part.
    """
    leaders = leading_rows(decision, np.fromiter(map(group_digest, lines(read.rows)), np.uint64))
    names = dict.fromkeys(np.flatnonzero(np.bincount(leaders) > 1).tolist(), "")  # of leaders that others follow
    pinned: Counter[Part] = Counter()
    read.index.clear_groups()
    position = -1
    for line, example, removal in walk(read, removals(decision)):
        if example is None:
            continue
        position += 1
        own, leader = json.loads(example)["group"], int(leaders[position])
        if leader == position and leader in names:
            names[leader] = own
        if removal is not None:
            continue
        group = names.get(leader, own)
        if group != own:
            read.index.join(own, group)
        read.index.add_to_group(group, group_position(group, salt), line.asked_part)
        if line.asked_part is not None:
            pinned[line.asked_part] += 1
    return pinned


def group_digest(example: str) -> int:
    return int.from_bytes(digest(json.loads(example)["group"], 8), "little")


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
