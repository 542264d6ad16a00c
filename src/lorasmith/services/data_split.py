"""Train, val and test: by the salted hash of each row's group, so that rows that belong together stay together.

Groups stand in the import's index, because there may be more of them than fit into memory.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from lorasmith.errors import InvalidData
from lorasmith.schemas.data import PARTS, DataPreparationSpec, Part
from lorasmith.services.data_index import ImportIndex

Shares = tuple[float, float, float]
LARGE = 1000  # rows from which the shares of a hash split are worth checking
TOLERANCE = 0.03
FREE = "pinned IS NULL"  # groups that no row assigns to a part


def assign_parts(
    index: ImportIndex,
    pinned_rows: Mapping[Part, int],
    spec: DataPreparationSpec,
    labelled: Iterable[tuple[str, str]] | None = None,
) -> str | None:
    """Give each group of the index its part; returns what a reader should know about it.

    `pinned_rows` counts the rows that ask for a part themselves: they fall there, and take the rest of their group with
    them. Adding rows never moves old ones, unless `spec.exact` asks for shares that are as near as the groups allow;
    with `labelled`, the group and label of each row in order, rows that are added behind the old ones never do.
    """
    run = index.connection.execute
    run(f"UPDATE groups SET part = pinned WHERE NOT {FREE}")
    free = run(f"SELECT count(*) FROM groups WHERE {FREE}").fetchone()[0]
    pinned_parts = {part for part, rows in pinned_rows.items() if rows}
    notes = []
    wanted = [part for part, share in zip(PARTS, spec.split, strict=True) if share > 0]
    if free and free < len(set(wanted) - pinned_parts):
        run(f"UPDATE groups SET part = 'train' WHERE {FREE}")
        notes.append(f"{counted(free, 'group')} cannot fill {len(wanted)} parts: all are in train")
    elif free:
        if labelled is not None:
            split_by_label(index, spec.split, labelled)
        else:
            cut = split_exactly if spec.exact else split_by_hash
            cut(index, spec.split)
        notes += fill_empty_parts(index, [part for part in wanted if part not in pinned_parts], spec)
    free_rows: dict[Part, int] = dict(run(f"SELECT part, sum(rows) FROM groups WHERE {FREE} GROUP BY part").fetchall())
    total = run("SELECT coalesce(sum(rows), 0) FROM groups").fetchone()[0]
    if total and not free_rows.get("train") and "train" not in pinned_parts:
        raise InvalidData(
            f"no row is left for train: all {total} ask for another part, in their field `split` or by the name of their "
            "file or folder",
            hint="set the field `split` of some rows to train, or import one of the files by itself",
        )
    spread = run("SELECT count(*) FROM groups WHERE spread").fetchone()[0]
    if spread:
        notes.append(f"{counted(spread, 'group')} in more than one part, as the field `split` asks")
    notes += [] if spec.exact or pinned_parts else uneven_shares(free_rows, total, spec.split)
    return "; ".join(notes) or None


def group_position(group: str, salt: str) -> float:
    """Where a group stands in [0, 1]: the first 8 bytes of sha256(salt, NUL, group) as a fraction."""
    digest = hashlib.sha256(f"{salt}\0{group}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def part_ranges(shares: Shares) -> dict[Part, tuple[float, float]]:
    """Positions from the first up to the second bound belong to the part; parts without a share are absent."""
    upper = list(accumulate(shares))
    bounds = {part: (upper[index] - shares[index], upper[index]) for index, part in enumerate(PARTS)}
    return {part: bounds[part] for part, share in zip(PARTS, shares, strict=True) if share > 0}


def split_by_hash(index: ImportIndex, shares: Shares) -> None:
    ranges = part_ranges(shares)
    last = list(ranges)[-1]  # also for a position that rounding puts above the last bound
    index.connection.execute(f"UPDATE groups SET part = ? WHERE {FREE}", (last,))
    for part, (_, upper) in reversed(ranges.items()):
        index.connection.execute(f"UPDATE groups SET part = ? WHERE {FREE} AND position < ?", (part, upper))


def split_by_label(index: ImportIndex, shares: Shares, labelled: Iterable[tuple[str, str]]) -> None:
    """Hold the shares within each label, row by row: a group gets its part when its first row comes.

    The part is drawn by the group's position from the parts that the label has too few rows of, each as probable as its
    rows are missing. With groups of one row no part ever has more rows of a label than its share, rounded up.
    """
    run = index.connection.execute
    run(f"UPDATE groups SET part = NULL WHERE {FREE}")
    rows_of_label: dict[str, Counter[Part]] = {}
    for group, label in labelled:
        position, pinned, part = run("SELECT position, pinned, part FROM groups WHERE name = ?", (group,)).fetchone()
        if pinned is not None:
            continue
        rows = rows_of_label.setdefault(label, Counter())
        if part is None:
            part = drawn_part(position, rows, shares)
            run("UPDATE groups SET part = ? WHERE name = ?", (part, group))
        rows[part] += 1


def drawn_part(position: float, rows: Mapping[Part, int], shares: Shares) -> Part:
    """One of the parts with fewer than their share of `rows` and one more."""
    total = sum(rows.values()) + 1
    missing = {part: share * total - rows[part] for part, share in zip(PARTS, shares, strict=True)}
    missing = {part: count for part, count in missing.items() if count > 1e-9}  # 0.1 * 30 is more than 3
    bounds = list(accumulate(missing.values()))
    return list(missing)[bisect_right(bounds, position * bounds[-1], hi=len(bounds) - 1)]


def split_exactly(index: ImportIndex, shares: Shares) -> None:
    """Groups in the order of their hash, cut where the row counts come nearest to the shares (rounded down)."""
    ordered = f"FROM groups WHERE {FREE} ORDER BY position, name"
    sizes = (size for (size,) in index.connection.execute(f"SELECT rows {ordered}"))
    rows_before = array("Q", accumulate(sizes, initial=0))  # 8 bytes a group
    start = 0
    targets = exact_counts(rows_before[-1], shares)
    for part, boundary in zip(targets, accumulate(targets.values()), strict=True):
        end = nearest(rows_before, boundary, start)
        index.connection.execute(
            f"UPDATE groups SET part = ? WHERE name IN (SELECT name {ordered} LIMIT ? OFFSET ?)",
            (part, end - start, start),
        )
        start = end


def nearest(ascending: Sequence[int], value: int, start: int) -> int:
    """Index from `start` on whose entry is nearest to the value; of two as near, the first."""
    above = bisect_left(ascending, value, lo=start)
    if above == len(ascending):
        return above - 1
    if above > start and value - ascending[above - 1] <= ascending[above] - value:
        return above - 1
    return above


def exact_counts(num_rows: int, shares: Shares) -> dict[Part, int]:
    """Rows of each part that has a share: rounded down, and the rest to the last. 298 rows give 238, 29 and 31."""
    counts: dict[Part, int] = {
        part: math.floor(share * num_rows + 1e-9)  # 0.29 * 100 is 28.999999999999996
        for part, share in zip(PARTS, shares, strict=True)
        if share > 0
    }
    last = list(counts)[-1]
    counts[last] += num_rows - sum(counts.values())
    return counts


def fill_empty_parts(index: ImportIndex, wanted: Sequence[Part], spec: DataPreparationSpec) -> list[str]:
    """Move the nearest group into each wanted part that came out empty, and say so."""
    notes = []
    run = index.connection.execute
    for part in wanted:
        counts: dict[Part, int] = dict(run(f"SELECT part, count(*) FROM groups WHERE {FREE} GROUP BY part").fetchall())
        if counts.get(part):
            continue
        lower, upper = part_ranges(spec.split)[part]
        movable = [other for other, count in counts.items() if count > 1 or other not in wanted]
        marks = ", ".join("?" * len(movable))
        name, before = run(
            f"SELECT name, part FROM groups WHERE {FREE} AND part IN ({marks}) "
            "ORDER BY max(? - position, position - ?), name LIMIT 1",
            (*movable, lower, upper),
        ).fetchone()
        notes.append(f"{part} came out empty, so the nearest group was moved there from {before}")
        run("UPDATE groups SET part = ? WHERE name = ?", (part, name))
    return notes


def uneven_shares(rows: Mapping[Part, int], total: int, shares: Shares) -> list[str]:
    if total < LARGE:
        return []
    return [
        f"{part} holds {rows.get(part, 0) / total:.1%} rather than {share:.0%}, because whole groups were assigned by "
        "their hash: --exact comes nearer"
        for part, share in zip(PARTS, shares, strict=True)
        if abs(rows.get(part, 0) / total - share) > TOLERANCE
    ]


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
