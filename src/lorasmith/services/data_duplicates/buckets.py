"""Rows that share a key, as pairs: all pairs of small buckets, and the large buckets by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from lorasmith.services.data_duplicates.shingles import I64, U64
from lorasmith.services.data_duplicates.similarity import encode

LARGEST_BUCKET = 24  # rows; 276 pairs. Larger ones are worked off by `crowds`
PAIRS_HELD = 1 << 22  # 32 MiB, before repetitions are taken out


def runs(keys: U64) -> tuple[I64, I64, I64]:
    """(order, start, length) of the runs of equal keys in sorted order; equal keys stay in their order."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])) if len(keys) else np.zeros(0, np.int64)
    return order, starts, np.diff(np.append(starts, len(keys)))


def small_pairs(members: I64, starts: I64, lengths: I64) -> Iterator[U64]:
    """Encoded pairs of the runs of 2 to 24 members, in parts."""
    for size in range(2, LARGEST_BUCKET + 1):
        chosen = starts[lengths == size]
        upper, lower = np.triu_indices(size, 1)
        at_once = max(1, PAIRS_HELD // len(upper))
        for first in range(0, len(chosen), at_once):
            buckets = members[chosen[first : first + at_once, None] + np.arange(size)]  # (buckets, size)
            yield encode(buckets[:, upper].ravel(), buckets[:, lower].ravel())


def large_runs(members: I64, starts: I64, lengths: I64) -> Iterator[I64]:
    for start, length in zip(starts[lengths > LARGEST_BUCKET], lengths[lengths > LARGEST_BUCKET], strict=True):
        yield members[start : start + length]


class PairSet:
    """Distinct encoded pairs; holds at most the distinct ones and 32 MiB more."""

    def __init__(self) -> None:
        self.distinct = np.zeros(0, np.uint64)
        self.waiting: list[U64] = []
        self.num_waiting = 0

    def add(self, pairs: U64) -> None:
        self.waiting.append(pairs)
        self.num_waiting += len(pairs)
        if self.num_waiting > max(PAIRS_HELD, len(self.distinct)):
            self.merge()

    def merge(self) -> U64:
        """The distinct pairs, ascending."""
        together = np.concatenate([self.distinct, *self.waiting])
        together.sort()
        self.distinct = together[np.append(True, together[1:] != together[:-1])] if len(together) else together
        self.waiting, self.num_waiting = [], 0
        return self.distinct


def distinct_pairs(parts: Iterable[U64]) -> U64:
    pairs = PairSet()
    for part in parts:
        pairs.add(part)
    return pairs.merge()
