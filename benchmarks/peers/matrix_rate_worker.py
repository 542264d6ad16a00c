"""How fast torch.mm multiplies the model's own shapes: the yardstick for a training step.

Settings {"products": [{"name", "rows", "in_features", "out_features", "count"}], "threads", "repeats"}. For each dtype
the answer holds, in GFLOP/s, every product forward (x W^T) and backward (dy W), "step" (all of them, weighted by count, as
one training step multiplies them) and "best" (the fastest single one).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import protocol
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    call()  # oneDNN compiles a kernel for each new shape
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def rates(products: list[dict[str, Any]], dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """GFLOP/s of each product and of the whole step, outputs in memory that is already there."""
    flops_of_step, seconds_of_step, each = 0.0, 0.0, {}
    for product in products:
        rows, wide, deep = product["rows"], product["out_features"], product["in_features"]
        x = torch.randn(rows, deep).to(dtype)
        weight = torch.randn(wide, deep).to(dtype)
        y = torch.randn(rows, wide).to(dtype)
        flops = 2.0 * rows * wide * deep
        for direction, seconds in (
            ("forward", median_seconds(lambda x=x, w=weight, y=y: torch.mm(x, w.t(), out=y), repeats)),
            ("backward", median_seconds(lambda x=x, w=weight, y=y: torch.mm(y, w, out=x), repeats)),
        ):
            each[f"{product['name']} {direction}"] = round(flops / seconds / 1e9, 1)
            flops_of_step += flops * product["count"]
            seconds_of_step += seconds * product["count"]
    return {"step": flops_of_step / seconds_of_step / 1e9, "best": max(each.values()), "products": each}


def main() -> None:
    settings, answers = protocol.begin()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    measured = {name: rates(settings["products"], dtype, settings["repeats"]) for name, dtype in DTYPES.items()}
    protocol.answer(answers, {**measured, "threads": torch.get_num_threads(), "torch": torch.__version__})


if __name__ == "__main__":
    main()
