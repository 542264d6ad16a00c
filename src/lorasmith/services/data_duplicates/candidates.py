"""Pairs of rows that are worth an exact comparison, found by their bands and compared; kept beside the index."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from lorasmith.files import write_bytes
from lorasmith.services.data_duplicates.buckets import PairSet, distinct_pairs, large_runs, runs, small_pairs
from lorasmith.services.data_duplicates.crowds import Crowd, crowd_of, distinct_buckets
from lorasmith.services.data_duplicates.index import Index, open_index
from lorasmith.services.data_duplicates.parallel import Workers
from lorasmith.services.data_duplicates.shingles import I64, U64, offsets_of
from lorasmith.services.data_duplicates.signatures import PERMUTATIONS, band_keys, lowest_threshold
from lorasmith.services.data_duplicates.similarity import F64, decode, jaccard

PAIRS_PER_TASK = 1 << 16
PAIRS_UNCOMPARED = 1 << 23  # 64 MiB; then they are compared, and those below the lowest threshold forgotten


@dataclass(frozen=True)
class Candidates:
    """What one banding found: encoded pairs of positions with their exact similarity, and the large buckets."""

    pairs: U64
    similarity: F64
    crowd: Crowd
    buckets: list[I64]


def candidates(index: Index, rows_per_band: int, workers: Workers) -> Candidates:
    """The candidates of a banding, from disk where they were found before. No text is hashed again."""
    path = index.folder / f"candidates-{rows_per_band}.npz"
    if not path.is_file():
        write_candidates(path, find_candidates(index, rows_per_band, workers))
    with np.load(path) as stored:
        bounds = stored["bucket_offsets"][1:-1]
        buckets = np.split(stored["bucket_rows"], bounds) if len(stored["bucket_rows"]) else []
        crowd = Crowd(stored["crowd_rows"], stored["crowd_frequent"])
        return Candidates(stored["pairs"], stored["similarity"], crowd, buckets)


def write_candidates(path: Path, found: Candidates) -> None:
    content = io.BytesIO()
    np.savez(
        content,
        pairs=found.pairs,
        similarity=found.similarity,
        crowd_rows=found.crowd.rows,
        crowd_frequent=found.crowd.frequent,
        bucket_rows=np.concatenate(found.buckets) if found.buckets else np.zeros(0, np.int64),
        bucket_offsets=offsets_of(np.array([len(bucket) for bucket in found.buckets], np.int64)),
    )
    write_bytes(path, content.getvalue())


def find_candidates(index: Index, rows_per_band: int, workers: Workers) -> Candidates:
    """Pairs at or above the lowest threshold that this banding serves."""
    lowest = lowest_threshold(rows_per_band)
    compared = ComparedPairs(index, lowest, workers)
    large: list[I64] = []
    bands = range(PERMUTATIONS // rows_per_band)
    for pairs, buckets in workers.map(partial(band_pairs, index.folder, rows_per_band), bands):
        compared.add(pairs)
        large = distinct_buckets([*large, *buckets])
    crowd, pairs = crowd_of(index.shingles, large, lowest)
    compared.add(pairs)
    compared.compare()
    return Candidates(compared.pairs, compared.similarity, crowd, large)


def band_pairs(folder: Path, rows_per_band: int, band: int) -> tuple[U64, list[I64]]:
    """Distinct pairs of the small buckets of one band, and the large ones."""
    index = open_index(folder)
    positions = index.candidates_of()
    columns = slice(band * rows_per_band, (band + 1) * rows_per_band)
    order, starts, lengths = runs(band_keys(index.signatures[:, columns][positions], band))
    members = positions[order]
    return distinct_pairs(small_pairs(members, starts, lengths)), list(large_runs(members, starts, lengths))


class ComparedPairs:
    """Collects candidate pairs; holds those at or above a threshold with their similarity, ascending."""

    def __init__(self, index: Index, threshold: float, workers: Workers) -> None:
        self.index, self.threshold, self.workers = index, threshold, workers
        self.waiting = PairSet()
        self.pairs: U64 = np.zeros(0, np.uint64)
        self.similarity: F64 = np.zeros(0)

    def add(self, pairs: U64) -> None:
        self.waiting.add(pairs)
        if len(self.waiting.distinct) > PAIRS_UNCOMPARED:
            self.compare()

    def compare(self) -> None:
        pairs = np.setdiff1d(self.waiting.merge(), self.pairs, assume_unique=True)
        self.waiting = PairSet()
        parts = [pairs[first : first + PAIRS_PER_TASK] for first in range(0, len(pairs), PAIRS_PER_TASK)]
        measured = list(self.workers.map(partial(similarities, self.index.folder), parts))
        similarity = np.concatenate([np.zeros(0), *measured])
        similar = similarity >= self.threshold
        together = np.concatenate([self.pairs, pairs[similar]])
        order = np.argsort(together, kind="stable")
        self.pairs = together[order]
        self.similarity = np.concatenate([self.similarity, similarity[similar]])[order]


def similarities(folder: Path, pairs: U64) -> F64:
    shingles = open_index(folder).shingles
    left, right = decode(pairs)
    return jaccard(shingles, left, shingles, right)
