"""MinHash signatures and how they are cut into bands (Broder 1997; Leskovec, Rajaraman, Ullman, chapter 3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lorasmith.errors import InvalidSpec
from lorasmith.schemas.data import LOWEST_SIMILARITY
from lorasmith.services.data_duplicates.shingles import STEP, U64, Ragged, mix

PERMUTATIONS = 256
SEED = 0x10_5A_17
REQUIRED_RECALL = 0.99
MOST_ROWS_PER_BAND = 8
BLOCK_ELEMENTS = 65_536  # 256 KiB of uint32: what is hashed 256 times stays in the second-level cache

Signatures = NDArray[np.uint16]


def candidate_probability(similarity: float, rows_per_band: int) -> float:
    """1 - (1 - s^r)^b with b = 256 // r bands: how probable it is that a pair with Jaccard s is compared."""
    return float(1 - (1 - similarity**rows_per_band) ** (PERMUTATIONS // rows_per_band))


def rows_per_band(threshold: float) -> int:
    """The most selective banding, 32 x 8 at most, that finds a pair at the threshold with probability >= 0.99.

    Raises `InvalidSpec` outside 0.4 to 1: below, nearly every pair of a large set would have to be compared.
    """
    if not LOWEST_SIMILARITY <= threshold <= 1:
        raise InvalidSpec(f"the similarity threshold must be between {LOWEST_SIMILARITY} and 1, got {threshold}")
    return max(
        rows for rows in range(1, MOST_ROWS_PER_BAND + 1) if candidate_probability(threshold, rows) >= REQUIRED_RECALL
    )


def lowest_threshold(rows: int) -> float:
    """The lowest threshold, in hundredths, that is served by a banding of `rows` rows a band."""
    hundredths = range(round(100 * LOWEST_SIMILARITY), 101)
    return next(value / 100 for value in hundredths if rows_per_band(value / 100) >= rows)


def multipliers() -> NDArray[np.uint32]:
    """Odd factors: x -> factor * x modulo 2^32 is a permutation, and shingles are evenly spread already."""
    return (mix(np.arange(SEED, SEED + PERMUTATIONS, dtype=np.uint64)) >> np.uint64(32)).astype(np.uint32) | np.uint32(
        1
    )


def signatures_of(shingles: Ragged) -> Signatures:
    """(rows, 256): the lower 16 bits of the least permuted value. Rows without shingles hold zeros.

    16 bits make one wrong agreement in 65,536, which costs a comparison and never a result.
    """
    result = np.zeros((len(shingles), PERMUTATIONS), np.uint16)
    hashes = (shingles.values >> np.uint64(32)).astype(np.uint32)
    lengths = shingles.lengths()
    order = np.argsort(lengths, kind="stable")
    order = order[np.searchsorted(lengths[order], 1) :]
    factors = multipliers()
    while len(order):
        longest_first = int(lengths[order[0]])
        size = max(1, min(len(order), BLOCK_ELEMENTS // longest_first))
        size = max(1, min(size, BLOCK_ELEMENTS // int(lengths[order[size - 1]])))
        block, order = order[:size], order[size:]
        longest = int(lengths[block[-1]])
        # (longest, rows of the block): a shorter row repeats its last shingle, which changes no minimum
        within = np.minimum(np.arange(longest)[:, None], lengths[block] - 1)
        laid = hashes[shingles.offsets[block] + within]
        permuted = np.empty_like(laid)
        least = np.empty((PERMUTATIONS, len(block)), np.uint32)
        for index, factor in enumerate(factors):
            np.multiply(laid, factor, out=permuted)
            np.minimum.reduce(permuted, axis=0, out=least[index])
        result[block] = least.T.astype(np.uint16)
    return result


def band_keys(signatures: Signatures, band: int) -> U64:
    """One 64-bit key for each row of one band's columns (rows, rows per band)."""
    keys = np.full(len(signatures), band + 1, np.uint64)
    for first in range(0, signatures.shape[1], 4):
        word = np.zeros(len(signatures), np.uint64)
        for column in signatures[:, first : first + 4].T:
            word = (word << np.uint64(16)) | column
        keys = mix(keys * STEP ^ word)
    return keys
