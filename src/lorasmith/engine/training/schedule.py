"""Learning rate by step, and intervals that shrink with a short run."""

from __future__ import annotations

import math
from typing import Literal


def warmup_length(wanted: int, total_steps: int) -> int:
    """Warm-up is never more than a tenth of the run, so that each run reaches its peak rate."""
    return min(wanted, total_steps // 10)


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
