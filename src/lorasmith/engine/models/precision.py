"""bf16 or fp32, chosen by measuring this machine."""

from __future__ import annotations

import time
from typing import Literal

import torch

Precision = Literal["bf16", "fp32"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WORTHWHILE = 1.3  # bf16 must be this much faster to pay for its casts


def choose_precision(wanted: Literal["auto", "bf16", "fp32"]) -> Precision:
    """bf16 where this CPU multiplies it natively, else fp32. Never fp16, which a CPU multiplies ten times slower."""
    if wanted != "auto":
        return wanted
    return "bf16" if matrix_seconds(torch.float32) > WORTHWHILE * matrix_seconds(torch.bfloat16) else "fp32"


def matrix_seconds(dtype: torch.dtype) -> float:
    """Seconds of the fastest of five (256, 1024) x (1024, 1024) products."""
    left, right = torch.randn(256, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(left, right)
        best = min(best, time.perf_counter() - began)
    return best
