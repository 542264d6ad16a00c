"""Rows laid end to end without padding: what a forward pass of the packed decoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from lorasmith.engine.data.rendering import RenderedExample


@dataclass(frozen=True)
class PackedRows:
    """T tokens of several rows. `labelled` (n,) are the positions whose next token is trained, `targets` (n,) those tokens."""

    ids: Tensor
    starts: list[int]
    lengths: list[int]
    labelled: Tensor
    targets: Tensor

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def segments(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, self.lengths, strict=True))


def pack(rows: Sequence[RenderedExample]) -> PackedRows:
    """Rows in the given order. The first token of a row is never a target: nothing of its own row stands before it."""
    lengths = [len(row.ids) for row in rows]
    starts = list(accumulate(lengths, initial=0))[:-1]
    ids = torch.tensor(list(chain.from_iterable(row.ids for row in rows)))
    labelled = torch.tensor(
        [
            start + index - 1
            for start, row in zip(starts, rows, strict=True)
            for index in range(1, len(row.ids))
            if row.trained[index]
        ],
        dtype=torch.long,
    )
    return PackedRows(ids, starts, lengths, labelled, ids[labelled + 1])


def token_groups(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split `order` into runs of at most `max_tokens` tokens; a longer row is a run of its own."""
    groups: list[list[int]] = []
    tokens = 0
    for index in order:
        if not groups or tokens + lengths[index] > max_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(index)
        tokens += lengths[index]
    return groups
