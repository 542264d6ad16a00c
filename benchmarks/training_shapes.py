"""How the training step slows down with the model's size, the rows' length and the vocabulary, and whether 7B fits.

python benchmarks/training_shapes.py [--only parameters|length|vocabulary|7b] [--cache DIR]: JSON lines, one closing line
per bar, exit 1 when short. Rank 16 on all linear layers, random weights, this machine's faster precision.

7b is one whole optimizer step of the 28-layer Qwen2.5-7B shape with weights in bf16, read from disk, in a process of its own: its
peak memory is held against 22 GiB, and the work of the CPU guide (298 rows, 3 epochs) is derived from its tokens/s. Where the CPU
does not multiply bf16 natively, products are computed in fp32 and rows one by one, as activations are twice as large.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import workload
from prefixes import ALL_AT_ONCE, adapted_model, auto_precision, make_rows, read_and_set, step_seconds
from report import Bar, close, emit
from train_vs_trl import Contest

from lorasmith.engine.models.workspace import retain_heap
from lorasmith.engine.training.computation import PackedComputation

BENCHMARK = "training_shapes"
PARAMETERS = ("smollm2-135m", "gemma3-270m", "qwen2-0.5b", "tinyllama-1.1b")
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)  # tokens of a row, half of them labelled
VOCABULARIES = (8_192, 49_152, 151_936)
STEP_TOKENS = 2048
MEMORY_BAR_GIB = 22.0
GUIDE_ROWS, GUIDE_EPOCHS = 298, 3  # what the CPU guide calls a night's work


def measure(config: workload.Config, tokens: int, rows: int, repeats: int) -> dict[str, Any]:
    """tokens/s of a step of that many rows, and the share of FLOPs that it cannot avoid in GFLOP/s."""
    data = make_rows(rows, tokens, 0, tokens // 2, config["vocab_size"])
    computation = PackedComputation(read_and_set(adapted_model(config)), seed=0, micro_batch_tokens=ALL_AT_ONCE)
    step_seconds(computation, data)  # allocates
    seconds = statistics.median(step_seconds(computation, data) for _ in range(repeats))
    flops = workload.step_flops(config, rows * tokens, rows * (tokens // 2))
    return {"seconds": seconds, "tokens_per_s": rows * tokens / seconds, "gflops": flops / seconds / 1e9}


def sweep(only: str | None, repeats: int) -> None:
    if only in (None, "parameters"):
        for shape in PARAMETERS:
            config = workload.SHAPES[shape]
            weights = workload.weight_bytes(config, 1)
            emit(BENCHMARK, sweep="parameters", shape=shape, weights=weights, **measure(config, 512, 4, repeats))
    small = workload.SHAPES["smollm2-135m"]
    if only in (None, "length"):
        for length in LENGTHS:
            rows = max(1, STEP_TOKENS // length)
            emit(BENCHMARK, sweep="length", tokens=length, rows=rows, **measure(small, length, rows, repeats))
    if only in (None, "vocabulary"):
        for size in VOCABULARIES:
            measured = measure({**small, "vocab_size": size}, 512, 4, repeats)
            emit(BENCHMARK, sweep="vocabulary", vocabulary=size, **measured)


def seven_billion(cache: Path) -> Bar:
    contest = Contest("qwen2.5-7b", cache, None)
    contest.prepare(["lorasmith"])
    step = 0  # no step before it is trained: what it allocates belongs to the peak
    at_once = {} if auto_precision() == "bf16" else {"micro_batch_tokens": 1}
    answer = contest.run_ours("lean", "auto", [step], warm_steps=0, **at_once)
    speed = answer["steps"][0]["tokens"] / answer["steps"][0]["seconds"]
    tokens = GUIDE_ROWS * GUIDE_EPOCHS * answer["steps"][0]["tokens"] / workload.ROWS_PER_STEP
    emit(BENCHMARK, run="7b", tokens_per_s=speed, guide_hours=tokens / speed / 3600, threads=torch.get_num_threads())
    peak = answer["peak_bytes"] / 2**30
    return Bar(
        "peak memory of a 7B step, weights in bf16",
        f"{peak:.1f} GiB",
        f"{MEMORY_BAR_GIB:.0f} GiB",
        peak / MEMORY_BAR_GIB,
        1.0,
        at_least=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("parameters", "length", "vocabulary", "7b"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "lorasmith-bench", help="kept files")
    options = parser.parse_args()
    bars = [seven_billion(options.cache)] if options.only in (None, "7b") else []  # in a memory that is still free
    retain_heap()
    sweep(options.only, options.repeats)
    return close(bars)


if __name__ == "__main__":
    sys.exit(main())
