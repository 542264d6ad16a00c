"""Rows laid end to end without padding: what a forward pass of the packed decoder reads.

Rows that begin with the same tokens may share them: the common beginning is computed once, and each row's rest attends
to it. Nothing changes in the result, as a causal model computes the same for equal beginnings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorasmith.engine.data.rendering import RenderedExample

SHARED_BLOCK = 16  # tokens; rows share whole blocks, as a shorter beginning costs more in small products than it saves


@dataclass(frozen=True)
class Segment:
    """Tokens `start` to `start + length` of a pack, which follow those at `before` (ranges of the pack, in order)."""

    start: int
    length: int
    before: tuple[slice, ...] = ()

    @property
    def offset(self) -> int:
        """Position of the first token in its row."""
        return sum(part.stop - part.start for part in self.before)

    @property
    def own(self) -> slice:
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True)
class PackedRows:
    """T tokens of several rows.

    `labelled` (n,) are the positions whose next token is trained, once for each row that has it, and `targets` (n,) those
    tokens. `chosen` are the labelled positions, each once and ascending: all that the last layer has to compute;
    `labelled_among_chosen` (n,) are `labelled` as indices into them. `lengths` are those of the rows, `chosen_lengths` how
    many of a row's tokens are labelled, `places` where a row's tokens are in the pack.
    """

    ids: Tensor
    segments: list[Segment]
    lengths: list[int]
    chosen_lengths: list[int]
    places: list[list[int]]
    labelled: Tensor
    targets: Tensor
    chosen: Tensor
    labelled_among_chosen: Tensor

    def to(self, device: torch.device) -> PackedRows:
        if self.ids.device == device:
            return self
        names = ("ids", "labelled", "targets", "chosen", "labelled_among_chosen")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


def pack(rows: Sequence[RenderedExample], *, share: bool = False) -> PackedRows:
    """Rows in the given order. The first token of a row is never a target: nothing of its own row stands before it."""
    tree = Tree(rows)
    if share:
        tree.grow(list(range(len(rows))), 0, ())
    else:
        for number, row in enumerate(rows):
            tree.place([number], row.ids, 0, ())
    labelled, targets = [], []
    for row, places in zip(rows, tree.places, strict=True):
        trained = [index for index in range(1, len(row.ids)) if row.trained[index]]
        labelled += [places[index - 1] for index in trained]
        targets += [row.ids[index] for index in trained]
    positions = torch.tensor(labelled, dtype=torch.long)
    chosen: Tensor = positions.unique()  # here and not on a GPU, which would have to be waited for
    return PackedRows(
        ids=torch.tensor(tree.ids),
        segments=tree.segments,
        lengths=[len(row.ids) for row in rows],
        chosen_lengths=[row.trained_tokens for row in rows],
        places=tree.places,
        labelled=positions,
        targets=torch.tensor(targets, dtype=torch.long),
        chosen=chosen,
        labelled_among_chosen=torch.searchsorted(chosen, positions),
    )


@dataclass
class Tree:
    """Segments of rows as they are laid out; `places` has the packed position of each token of each row."""

    rows: Sequence[RenderedExample]
    ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    places: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.places = [[] for _ in self.rows]

    def place(self, group: list[int], ids: list[int], depth: int, before: tuple[slice, ...]) -> tuple[slice, ...]:
        """Lay out `ids`, which the rows of the group have from `depth` on; returns what then stands before their rest."""
        if not ids:
            return before
        segment = Segment(len(self.ids), len(ids), before)
        self.segments.append(segment)
        self.ids += ids
        for number in group:
            self.places[number] += range(segment.start, segment.start + segment.length)
        return (*before, segment.own)

    def grow(self, group: list[int], depth: int, before: tuple[slice, ...]) -> None:
        """Lay out rows that agree up to `depth`: what more they share, then each part of them that shares more."""
        parts: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number in group:
            parts[tuple(self.rows[number].ids[depth : depth + SHARED_BLOCK])].append(number)
        for start, part in parts.items():
            if len(part) == 1 or len(start) < SHARED_BLOCK:
                for number in part:
                    self.place([number], self.rows[number].ids[depth:], depth, before)
                continue
            end = shared_length([self.rows[number].ids for number in part])
            self.grow(part, end, self.place(part, self.rows[part[0]].ids[depth:end], depth, before))


def shared_length(sequences: Sequence[list[int]]) -> int:
    """Tokens that all of them begin with, in whole blocks: the least and the greatest sequence differ first."""
    least, greatest = min(sequences), max(sequences)
    length = min(len(least), len(greatest))
    differ = next((index for index in range(length) if least[index] != greatest[index]), length)
    return differ - differ % SHARED_BLOCK


def token_groups(
    order: Sequence[int], rows: Sequence[RenderedExample], max_tokens: int, *, share: bool
) -> list[list[int]]:
    """Split `order` into runs of at most `max_tokens` packed tokens; a longer row is a run of its own.

    Neighbours in the order count what they share once.
    """
    groups: list[list[int]] = []
    tokens = 0
    for index in order:
        length = len(rows[index].ids)
        fresh = length - shared_length([rows[groups[-1][-1]].ids, rows[index].ids]) if share and groups else length
        if not groups or tokens + fresh > max_tokens:
            groups.append([])
            tokens, fresh = 0, length
        groups[-1].append(index)
        tokens += fresh
    return groups
