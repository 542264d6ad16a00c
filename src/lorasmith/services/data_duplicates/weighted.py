"""A second, slower pass: rows whose TF-IDF vectors point the same way, whatever the order of their words.

Terms are character n-grams of 3 to 5; a term's weight is (1 + ln tf) * (ln((1 + rows) / (1 + df)) + 1), smoothed as in
scikit-learn's TfidfVectorizer with sublinear_tf, and vectors have length 1. It compares all pairs: first sketches of
256 signed random sums (Charikar, Chen, Farach-Colton 2002), then the exact cosine of the pairs that come within 0.15.
No model and nothing to download; it finds paraphrases only as far as they share words and word stems.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorasmith.errors import InvalidSpec
from lorasmith.services.data_duplicates.shingles import I64, U64, Ragged, grams, mix, offsets_of, tokens_of
from lorasmith.services.data_duplicates.texts import folded

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

SIZES = (3, 4, 5)
SKETCH = 256
DEFAULT_COSINE = 0.8
MARGIN = 0.15  # seven standard errors of a sketch at a cosine of 0.8: (1 - 0.8^2) / sqrt(256) = 0.0225
MOST_ROWS = 20_000  # 200 million pairs; about 60 KB a row while the vectors are made
ROWS_AT_ONCE = 1024
TEXTS_AT_ONCE = 2048


class SimilarPair(NamedTuple):
    """Two positions, the smaller first, and the cosine of their vectors."""

    left: int
    right: int
    cosine: float


def similar_pairs(texts: Iterable[str], threshold: float = DEFAULT_COSINE) -> Iterator[SimilarPair]:
    """All pairs at or above the threshold, by position. Raises `InvalidSpec` beyond 20,000 rows or outside 0.5 to 1."""
    check_cosine(threshold)
    held = [folded(text) for text in islice(texts, MOST_ROWS + 1)]
    if len(held) > MOST_ROWS:
        raise InvalidSpec(
            f"all pairs are compared, which takes too long above {MOST_ROWS} rows, and there are more",
            hint="take near duplicates out first (data import --near-duplicates 0.8), or compare a sample",
        )
    vectors, weights = weigh(held)
    sketches = sketch(vectors, weights)
    for first in range(0, len(held), ROWS_AT_ONCE):
        close = sketches[first : first + ROWS_AT_ONCE] @ sketches[first:].T  # (rows, rows from here on)
        left, right = np.nonzero(np.triu(close >= threshold - MARGIN, 1))
        cosine = cosines(vectors, weights, left + first, right + first)
        for place in np.flatnonzero(cosine >= threshold - 1e-12).tolist():
            yield SimilarPair(int(left[place]) + first, int(right[place]) + first, min(1.0, float(cosine[place])))


def check_cosine(threshold: float) -> None:
    if not 0.5 <= threshold <= 1:
        raise InvalidSpec(f"the threshold of the cosine must be between 0.5 and 1, got {threshold}")


def weigh(texts: list[str]) -> tuple[Ragged, F64]:
    """Terms of each text, ascending, and the weight of each in a vector of length 1."""
    terms, counts = count_terms(texts)
    _, number, held_by = np.unique(terms.values, return_inverse=True, return_counts=True)
    inverse = np.log((1 + len(texts)) / (1 + held_by)) + 1
    weights = (1 + np.log(counts)) * inverse[number]
    totals = np.append(0, np.cumsum(weights**2))
    norms = np.sqrt(totals[terms.offsets[1:]] - totals[terms.offsets[:-1]])
    return terms, np.asarray(weights / np.repeat(norms, terms.lengths()))


def count_terms(texts: list[str]) -> tuple[Ragged, F64]:
    values, counts, lengths = [np.zeros(0, np.uint64)], [np.zeros(0)], [np.zeros(0, np.int64)]
    for first in range(0, len(texts), TEXTS_AT_ONCE):
        tokens = tokens_of(texts[first : first + TEXTS_AT_ONCE], "character").hashes
        of_size = [grams(tokens, size, padded=True) for size in SIZES]
        for index in range(len(tokens)):
            found, times = np.unique(np.concatenate([part[index] for part in of_size]), return_counts=True)
            values.append(found)
            counts.append(times.astype(np.float64))
            lengths.append(np.array([len(found)]))
    return Ragged(np.concatenate(values), offsets_of(np.concatenate(lengths))), np.concatenate(counts)


def sketch(vectors: Ragged, weights: F64) -> F32:
    """(rows, 256) of length 1: each term's weight, with its own sign, is added to one of 256 sums, four times over."""
    rows = np.zeros((len(vectors), SKETCH))
    for first in range(0, len(vectors), ROWS_AT_ONCE):
        block = rows[first : first + ROWS_AT_ONCE]
        lengths = vectors.lengths()[first : first + ROWS_AT_ONCE]
        part = slice(vectors.offsets[first], vectors.offsets[first + len(block)])
        owner = np.repeat(np.arange(len(block)), lengths)
        for time in range(4):
            hashes: U64 = mix(vectors.values[part] ^ np.uint64(0x5851F42D4C957F2D * (time + 1) % 2**64))
            place = (hashes % np.uint64(SKETCH)).astype(np.int64)
            sign = np.where(hashes >> np.uint64(63), 1.0, -1.0)
            block += np.bincount(owner * SKETCH + place, weights[part] * sign, block.size).reshape(block.shape)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def cosines(vectors: Ragged, weights: F64, left: I64, right: I64) -> F64:
    result = np.zeros(len(left))
    for place, (one, other) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
        mine, theirs = vectors[one], vectors[other]
        _, here, there = np.intersect1d(mine, theirs, assume_unique=True, return_indices=True)
        result[place] = weights[vectors.offsets[one] + here] @ weights[vectors.offsets[other] + there]
    return result
