"""Learning rate by step, intervals that shrink with a short run, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal


def warmup_length(steps: int | None, ratio: float | None, total_steps: int) -> int:
    """`ratio` of the run, to the nearest step; or `steps`, at most a tenth. Each run reaches its peak rate."""
    if ratio is not None:
        return min(round(ratio * total_steps), total_steps - 1)
    return min(steps or 0, total_steps // 10)


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, kind: Literal["cosine", "linear", "constant"]
) -> float:
    """Rate of step `step` (from 0): linear rise over `warmup` steps, then the chosen decay to zero at `total`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress) if kind == "linear" else peak


def interval(wanted: int, total_steps: int, at_least: int) -> int:
    """`wanted` steps, or fewer so that a short run still has `at_least` of them."""
    return max(1, min(wanted, total_steps // at_least))


def best_evaluation(evaluations: Sequence[tuple[int, float]]) -> tuple[int, float] | None:
    """Step and loss of the lowest, the earliest of equals; NaN is never the best."""
    finite = [(step, loss) for step, loss in evaluations if not math.isnan(loss)]
    return min(finite, key=lambda evaluation: evaluation[1]) if finite else None


def evaluations_since_best(evaluations: Sequence[tuple[int, float]]) -> int:
    """How many came after the best one."""
    best = best_evaluation(evaluations)
    return len(evaluations) if best is None else sum(step > best[0] for step, _ in evaluations)
