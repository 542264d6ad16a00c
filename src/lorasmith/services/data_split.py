"""Train, val and test: by the salted hash of each row's group, so that rows that belong together stay together."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lorasmith.errors import InvalidData
from lorasmith.schemas.data import PARTS, DataPreparationSpec, Example, Part

Shares = tuple[float, float, float]
LARGE = 1000  # rows from which the shares of a hash split are worth checking
TOLERANCE = 0.03


@dataclass(frozen=True)
class Split:
    """The part of each group, and what a reader should know about it."""

    part_of_row: dict[int, Part]
    note: str | None


def split_examples(examples: Sequence[Example], pinned: Mapping[int, Part], spec: DataPreparationSpec) -> Split:
    """The part of each example, keyed by its input row.

    `pinned` rows fall where they ask to, and take the rest of their group with them. Adding rows never moves old ones,
    unless `spec.exact` asks for shares that are as near as the groups allow.
    """
    part_of_group: dict[str, Part] = {}
    for example in examples:
        if example.row in pinned:
            part_of_group.setdefault(example.group, pinned[example.row])
    sizes = Counter(example.group for example in examples if example.group not in part_of_group)
    parts_of_pins = set(pinned.values())
    notes = []
    wanted = [part for part, share in zip(PARTS, spec.split, strict=True) if share > 0]
    if sizes and len(sizes) < len(set(wanted) - parts_of_pins):
        part_of_group.update(dict.fromkeys(sizes, "train"))
        notes.append(f"{counted(len(sizes), 'group')} cannot fill {len(wanted)} parts: all are in train")
    elif sizes:
        cut = split_exactly if spec.exact else split_by_hash
        free = cut(sizes, spec.split, spec.salt)
        notes += fill_empty_parts(free, [part for part in wanted if part not in parts_of_pins], spec)
        part_of_group.update(free)
    part_of_row = {example.row: pinned.get(example.row) or part_of_group[example.group] for example in examples}
    if examples and "train" not in part_of_row.values():
        raise InvalidData(
            f"no row is left for train: all {len(examples)} ask for another part in their field `split`",
            hint="take the field `split` out of some rows, or set it to train",
        )
    notes += spread_groups(examples, part_of_row)
    notes += [] if spec.exact or pinned else uneven_shares(part_of_row, spec.split)
    return Split(part_of_row, "; ".join(notes) or None)


def group_position(group: str, salt: str) -> float:
    """Where a group stands in [0, 1]: the first 8 bytes of sha256(salt, NUL, group) as a fraction."""
    digest = hashlib.sha256(f"{salt}\0{group}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def part_ranges(shares: Shares) -> dict[Part, tuple[float, float]]:
    """Positions from the first up to the second bound belong to the part; parts without a share are absent."""
    upper = list(accumulate(shares))
    bounds = {part: (upper[index] - shares[index], upper[index]) for index, part in enumerate(PARTS)}
    return {part: bounds[part] for part, share in zip(PARTS, shares, strict=True) if share > 0}


def split_by_hash(sizes: Mapping[str, int], shares: Shares, salt: str) -> dict[str, Part]:
    ranges = part_ranges(shares)
    last = list(ranges)[-1]  # also for a position that rounding puts above the last bound
    positions = {group: group_position(group, salt) for group in sizes}
    return {
        group: next((part for part, (_, upper) in ranges.items() if position < upper), last)
        for group, position in positions.items()
    }


def split_exactly(sizes: Mapping[str, int], shares: Shares, salt: str) -> dict[str, Part]:
    """Groups in the order of their hash, cut where the row counts come nearest to the shares (rounded down)."""
    ordered = sorted(sizes, key=lambda group: (group_position(group, salt), group))
    rows_before = [0, *accumulate(sizes[group] for group in ordered)]
    result: dict[str, Part] = {}
    start = 0
    targets = exact_counts(sum(sizes.values()), shares)
    for part, boundary in zip(targets, accumulate(targets.values()), strict=True):
        end = min(range(start, len(rows_before)), key=lambda index: abs(rows_before[index] - boundary))
        result.update(dict.fromkeys(ordered[start:end], part))
        start = end
    return result


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


def fill_empty_parts(part_of_group: dict[str, Part], wanted: Sequence[Part], spec: DataPreparationSpec) -> list[str]:
    """Move the nearest group into each wanted part that came out empty, and say so. Changes `part_of_group`."""
    notes = []
    positions = {group: group_position(group, spec.salt) for group in part_of_group}
    for part in wanted:
        counts = Counter(part_of_group.values())
        if counts[part]:
            continue
        lower, upper = part_ranges(spec.split)[part]
        movable = (group for group, present in part_of_group.items() if counts[present] > 1 or present not in wanted)
        _, nearest = min((max(lower - positions[group], positions[group] - upper), group) for group in movable)
        notes.append(f"{part} came out empty, so the nearest group was moved there from {part_of_group[nearest]}")
        part_of_group[nearest] = part
    return notes


def spread_groups(examples: Sequence[Example], part_of_row: Mapping[int, Part]) -> list[str]:
    pairs = {(example.group, part_of_row[example.row]) for example in examples}
    spread = sum(1 for count in Counter(group for group, _ in pairs).values() if count > 1)
    return [f"{counted(spread, 'group')} in more than one part, as the field `split` asks"] if spread else []


def uneven_shares(part_of_row: Mapping[int, Part], shares: Shares) -> list[str]:
    counts = Counter(part_of_row.values())
    total = len(part_of_row)
    if total < LARGE:
        return []
    return [
        f"{part} holds {counts[part] / total:.1%} rather than {share:.0%}, because whole groups were assigned by "
        "their hash: --exact comes nearer"
        for part, share in zip(PARTS, shares, strict=True)
        if abs(counts[part] / total - share) > TOLERANCE
    ]


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
