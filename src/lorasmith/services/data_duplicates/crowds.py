"""Buckets with too many rows for all their pairs, as a text template or a long chain of small edits makes them.

Comparing all pairs of m rows is m^2 / 2 work. Two exact facts make it unnecessary for nearly all of them:

1. Prefix filter (Chaudhuri, Ganti, Kaushik 2006; Bayardo, Ma, Srikant 2007): order every row's n shingles from the
   rarest to the most frequent. Two rows with Jaccard >= t have their first common shingle among the first
   n - ceil(t n) + 1 of both. Where that shingle is in at most 24 rows, its rows are compared with one another.
2. Otherwise all they have in common is in more than 24 rows each ("frequent"), and then at least one of the two rows
   has frequent shingles for a share of 2t / (1 + t) or more. Such a row is compared with the rest of its bucket, except
   with rows that are in its cluster already: rows that are all alike are one cluster after one comparison each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorasmith.services.data_duplicates.buckets import LARGEST_BUCKET, distinct_pairs, runs, small_pairs
from lorasmith.services.data_duplicates.clusters import Differ
from lorasmith.services.data_duplicates.shingles import I64, U64, Ragged, mix
from lorasmith.services.data_duplicates.similarity import F64, against_one, encode

ROWS_AT_ONCE = 4096
ELEMENTS_AT_ONCE = 1 << 22  # 32 MiB of uint64, and as much again for their order


@dataclass(frozen=True)
class Crowd:
    """Rows of large buckets, ascending, and how many shingles of each are frequent among them."""

    rows: I64
    frequent: I64


def crowd_of(shingles: Ragged, buckets: Sequence[I64], threshold: float) -> tuple[Crowd, U64]:
    """The crowd of these buckets, and the encoded pairs that share a rare shingle of their prefixes."""
    if not buckets:
        return Crowd(np.zeros(0, np.int64), np.zeros(0, np.int64)), np.zeros(0, np.uint64)
    rows = np.unique(np.concatenate(buckets))
    sets = shingles.take(rows)
    spread = np.ones(len(sets.values), np.uint8)  # in how many rows of the crowd a shingle is, 25 for more than 24
    for places in by_range(sets.values):
        order, starts, lengths = runs(sets.values[places])
        spread[places[order]] = np.repeat(np.minimum(lengths, LARGEST_BUCKET + 1), lengths)
    frequent_before = np.append(0, np.cumsum(spread > LARGEST_BUCKET))
    frequent = frequent_before[sets.offsets[1:]] - frequent_before[sets.offsets[:-1]]
    chosen = prefix_places(sets, spread, threshold)
    chosen = chosen[(spread[chosen] > 1) & (spread[chosen] <= LARGEST_BUCKET)]
    owner = (np.searchsorted(sets.offsets, chosen, side="right") - 1).astype(np.int64)
    order, starts, lengths = runs(sets.values[chosen])
    return Crowd(rows, frequent), distinct_pairs(small_pairs(rows[owner[order]], starts, lengths))


def by_range(values: U64) -> Iterator[I64]:
    """Places of the values in a few parts; equal values are in one part."""
    parts = max(1, -(-len(values) // ELEMENTS_AT_ONCE))
    part_of = (mix(values) % np.uint64(parts)).astype(np.uint16) if parts > 1 else np.zeros(len(values), np.uint16)
    for part in range(parts):
        yield np.flatnonzero(part_of == part)


def prefix_places(sets: Ragged, spread: NDArray[np.uint8], threshold: float) -> I64:
    """Places in `sets.values` of each row's first n - ceil(t n) + 1 shingles, the rarest first, then by value."""
    sizes = sets.lengths()
    prefixes = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    parts = []
    first = 0
    while first < len(sets):
        last = int(np.searchsorted(sets.offsets, sets.offsets[first] + ELEMENTS_AT_ONCE, side="right")) - 1
        last = max(first + 1, last)
        begin, end = sets.offsets[first], sets.offsets[last]
        owner = np.repeat(np.arange(last - first), sizes[first:last])
        order = np.argsort(owner << 8 | spread[begin:end], kind="stable")  # stable: values ascend within a row
        rank = np.arange(end - begin) - np.repeat(sets.offsets[first:last] - begin, sizes[first:last])
        parts.append(begin + order[rank < np.repeat(prefixes[first:last], sizes[first:last])])
        first = last
    return np.concatenate(parts)


def distinct_buckets(buckets: Iterable[I64]) -> list[I64]:
    """Each bucket once: rows that are all alike share one in every band."""
    return list({bucket.tobytes(): bucket for bucket in buckets}.values())


class Forest:
    """Union-find over positions, for whole arrays of them. The root of a tree is its smallest position."""

    def __init__(self, parent: I64) -> None:
        self.parent = parent

    def roots(self, positions: I64) -> I64:
        roots = self.parent[positions]
        while not np.array_equal(above := self.parent[roots], roots):
            roots = above
        self.parent[positions] = roots
        return roots

    def join(self, roots: I64) -> int:
        smallest = int(roots.min())
        self.parent[roots] = smallest
        return smallest


@dataclass(frozen=True)
class Links:
    """Encoded pairs at or above the threshold, and how many pairs were left out because the budget was spent."""

    pairs: U64
    uncompared: int


def link_crowd(
    crowd: Crowd,
    buckets: Sequence[I64],
    shingles: Ragged,
    labels: I64,
    threshold: float,
    differ: Differ,
    budget: int,
) -> Links:
    """Links between the clusters in `labels` (the smallest position of each row's cluster) within the large buckets.

    Compares rows mostly made of frequent shingles with the rows of their bucket that are in other clusters; at most
    `budget` comparisons. Pairs for which `differ` is true are never linked.
    """
    forest = Forest(labels.copy())
    share = 2 * threshold / (1 + threshold)
    found: list[U64] = []
    uncompared = 0
    sizes = shingles.lengths()
    for bucket in buckets:
        frequent = crowd.frequent[np.searchsorted(crowd.rows, bucket)]
        roots = forest.roots(bucket)
        for place in np.flatnonzero(frequent >= share * sizes[bucket] - 1e-9).tolist():
            others = np.flatnonzero(roots != roots[place])
            if not len(others):
                break
            if len(others) > budget:
                uncompared += len(others)
                continue
            budget -= len(others)
            pivot = bucket[place]
            values = similarity_with(pivot, bucket[others], shingles)
            others, values = others[values >= threshold], values[values >= threshold]
            similar = others[~differ(np.full(len(others), pivot), bucket[others], values)]
            if len(similar):
                found.append(encode(np.full(len(similar), pivot), bucket[similar]))
                joined = np.unique(np.append(roots[similar], roots[place]))
                roots[np.isin(roots, joined)] = forest.join(joined)
    return Links(np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64), uncompared)


def similarity_with(pivot: int, others: I64, shingles: Ragged) -> F64:
    parts = [
        against_one(shingles[pivot], shingles.take(others[first : first + ROWS_AT_ONCE]))
        for first in range(0, len(others), ROWS_AT_ONCE)
    ]
    return np.concatenate(parts)
