"""Exact Jaccard similarity of shingle sets: |A ∩ B| / |A ∪ B|, for many pairs at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorasmith.services.data_duplicates.shingles import I64, U64, Ragged

F64 = NDArray[np.float64]

PAIRS_AT_ONCE = 4096
ELEMENTS_AT_ONCE = 1 << 20  # 8 MiB of uint64
PAIR_BITS = np.uint64(12)  # 4096 pairs; the other 52 bits of a shingle stay
LOW_32 = np.uint64(0xFFFFFFFF)


def encode(left: NDArray[np.integer], right: NDArray[np.integer]) -> U64:
    """Pairs of positions as single numbers, the smaller position in the upper half."""
    first, second = np.minimum(left, right).astype(np.uint64), np.maximum(left, right).astype(np.uint64)
    return np.asarray((first << np.uint64(32)) | second)


def decode(pairs: U64) -> tuple[I64, I64]:
    return (pairs >> np.uint64(32)).astype(np.int64), (pairs & LOW_32).astype(np.int64)


def jaccard(lefts: Ragged, left: I64, rights: Ragged, right: I64) -> F64:
    """Similarity of text `left[i]` of `lefts` and `right[i]` of `rights`; 0 when either has no shingles.

    Each pair's two sets are sorted together, so that a shared shingle stands beside its twin. The pair's number takes
    the place of the lowest 12 bits of a shingle: two different shingles of one pair agree in the rest with
    probability 2^-52.
    """
    left_sizes, right_sizes = lefts.lengths()[left], rights.lengths()[right]
    result = np.zeros(len(left))
    ends = np.cumsum(left_sizes + right_sizes)
    start = 0
    while start < len(left):
        full = int(np.searchsorted(ends, (ends[start - 1] if start else 0) + ELEMENTS_AT_ONCE, side="right"))
        stop = max(start + 1, min(start + PAIRS_AT_ONCE, full))
        batch = slice(start, stop)
        shared = intersections(lefts.take(left[batch]), rights.take(right[batch]))
        united = left_sizes[batch] + right_sizes[batch] - shared
        np.divide(shared, united, out=result[batch], where=united > 0)
        start = stop
    return result


def intersections(lefts: Ragged, rights: Ragged) -> I64:
    """|A ∩ B| of the texts at equal positions, at most 4096 of them."""
    keys = np.concatenate([tagged(lefts), tagged(rights)])
    keys.sort()
    twins = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(64 - PAIR_BITS)
    return np.bincount(twins.astype(np.intp), minlength=len(lefts)).astype(np.int64)


def tagged(texts: Ragged) -> U64:
    pair = np.repeat(np.arange(len(texts), dtype=np.uint64), texts.lengths())
    return (pair << np.uint64(64 - PAIR_BITS)) | (texts.values >> PAIR_BITS)


def against_one(one: U64, texts: Ragged) -> F64:
    """Similarity of one ascending set with each text."""
    result = np.zeros(len(texts))
    if not len(one) or not len(texts.values):
        return result
    places = np.minimum(np.searchsorted(one, texts.values), len(one) - 1)
    shared_before = np.zeros(len(texts.values) + 1, np.int64)
    np.cumsum(one[places] == texts.values, out=shared_before[1:])
    shared = shared_before[texts.offsets[1:]] - shared_before[texts.offsets[:-1]]
    return np.asarray(shared / (texts.lengths() + len(one) - shared))
