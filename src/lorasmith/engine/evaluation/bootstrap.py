"""Percentile bootstrap intervals of means over examples, and of paired differences.

Every column of a table is resampled with the same examples, so a difference is computed between conditions on the
same draw; what makes one example hard for both cancels out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lorasmith.schemas.evaluation import Interval

LEVEL = 0.95
CELLS_PER_BLOCK = 4_000_000  # counts drawn at once: 32 MB


def resampled_means(values: NDArray[np.float64], *, resamples: int, seed: int) -> NDArray[np.float64]:
    """Means (resamples, k) of the columns of `values` (n, k) over n examples drawn with replacement."""
    n = len(values)
    rng = np.random.default_rng(seed)
    origin = values[0]
    offsets = values - origin  # exact zeros where all examples are equal, so that such an interval has no width
    means = np.empty((resamples, values.shape[1]))
    block = max(1, CELLS_PER_BLOCK // n)
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        counts = rng.multinomial(n, np.full(n, 1 / n), size=size)  # (size, n): how often each example was drawn
        means[start : start + size] = origin + counts @ offsets / n
    return means


def mean_intervals(values: ArrayLike, *, resamples: int, seed: int) -> list[Interval]:
    """The mean of each column of `values` (n, k) with its 95 % percentile interval; n is at least 1."""
    table = np.asarray(values, dtype=np.float64)
    draws = resampled_means(table, resamples=resamples, seed=seed)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)  # (k,) each
    means = table[0] + (table - table[0]).mean(axis=0)
    return [
        Interval(mean=float(mean), low=float(bottom), high=float(top))
        for mean, bottom, top in zip(means, low, high, strict=True)
    ]


def mean_interval(values: ArrayLike, *, resamples: int, seed: int) -> Interval:
    """The mean of `values` (n,) with its 95 % percentile interval."""
    return mean_intervals(np.asarray(values, dtype=np.float64)[:, None], resamples=resamples, seed=seed)[0]


def paired_differences(treatment: ArrayLike, baseline: ArrayLike, *, resamples: int, seed: int) -> list[Interval]:
    """The mean of `treatment - baseline` for each column of two tables (n, k), example by example, with its interval."""
    difference = np.asarray(treatment, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    return mean_intervals(difference, resamples=resamples, seed=seed)
