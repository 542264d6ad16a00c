"""What each idea of the training step is worth: the step as it is against itself with one thing changed.

python benchmarks/step_ideas.py [--shape NAME] [--repeats N]: JSON lines, then one line per idea with the ratio of tokens/s and
of peak memory to the step as it is. Every run is a process of its own; the runs alternate. There is no bar: the numbers of
docs/concepts/training.md come from here.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
import workload
from prefixes import adapted_model, auto_precision, read_and_set
from report import emit

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.models.families import pack_weights, read_decoder
from lorasmith.engine.models.workspace import retain_heap
from lorasmith.engine.training.computation import Computation, PackedComputation, PeftComputation
from lorasmith.engine.training.loss import CompletionLoss

BENCHMARK = "step_ideas"
IDEAS = {
    "as it is": "rows end to end, head on labelled tokens, weights as they are, heap kept",
    "plain products": "products with frozen weights in fp32 or bf16, where they would be in integers",
    "padded": "rows filled up to the longest of their step",
    "all labelled": "the head, the loss and the last layer for every token",
    "heap given back": "freed memory goes back to the system",
    "packed weights": "frozen weights in two layouts of oneDNN",
    "compiled": "norm, gate and rotation compiled",
    "attention again": "attention weights computed again, as a lean run has it",
    "layers computed again": "gradient checkpointing",
    "through PEFT": "padded rows through transformers, PEFT and autograd",
}


def rows_of(config: workload.Config, idea: str) -> list[RenderedExample]:
    rows = [
        RenderedExample(number, row["input_ids"], [bool(mask) for mask in row["completion_mask"]])
        for number, row in enumerate(workload.make_rows(config))
    ]
    if idea == "all labelled":
        return [replace(row, trained=[True] * len(row.ids)) for row in rows]
    if idea == "padded":
        for start in range(0, len(rows), workload.ROWS_PER_STEP):
            step = rows[start : start + workload.ROWS_PER_STEP]
            longest = max(len(row.ids) for row in step)
            rows[start : start + len(step)] = [filled(row, longest) for row in step]
    return rows


def filled(row: RenderedExample, length: int) -> RenderedExample:
    spare = length - len(row.ids)
    return replace(row, ids=row.ids + row.ids[:1] * spare, trained=row.trained + [False] * spare)


def computation_of(config: workload.Config, idea: str) -> Computation:
    model = adapted_model(config)
    if idea == "through PEFT":
        precision = auto_precision()
        return PeftComputation(
            model,
            CompletionLoss(model.get_base_model(), config["vocab_size"], precision),
            seed=0,
            pad_id=0,
            precision=precision,
            batch_rows=workload.ROWS_PER_STEP,
        )
    decoder = read_decoder(model) if idea in ("plain products", "packed weights") else read_and_set(model)
    if idea == "packed weights":
        pack_weights(decoder, model)
    return PackedComputation(
        decoder,
        seed=0,
        micro_batch_tokens=4096,
        recompute=idea == "layers computed again",
        lean=idea == "attention again",
        compiled=idea == "compiled",
    )


def measure(shape: str, idea: str) -> None:
    """In a process of its own: two steps that allocate and compile, then the timed four; prints one JSON line."""
    config = workload.SHAPES[shape]
    if idea != "heap given back":
        retain_heap()
    rows, computation = rows_of(config, idea), computation_of(config, idea)
    tokens = workload.tokens_of(workload.make_rows(config))
    starts = range(0, len(rows), workload.ROWS_PER_STEP)

    def step(start: int) -> None:
        for group in computation.micro_batches(range(start, start + workload.ROWS_PER_STEP), rows):
            computation.gradients(group, rows, scale=1e-3, step=start)

    def tokens_of_step(start: int) -> int:
        return sum(len(row.ids) for row in rows[start : start + workload.ROWS_PER_STEP])

    step(max(starts, key=tokens_of_step))
    step(min(starts, key=tokens_of_step))  # compiles once more, for other lengths
    began = time.perf_counter()
    for start in starts:
        step(start)
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"tokens_per_s": tokens / seconds, "peak_bytes": peak, "threads": torch.get_num_threads()}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=workload.SHAPES, default="smollm2-135m")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--idea", choices=IDEAS, help="measure this one, in this process")
    options = parser.parse_args()
    if options.idea:
        measure(options.shape, options.idea)
        return 0
    found: dict[str, list[dict[str, float]]] = {idea: [] for idea in IDEAS}
    for repeat in range(options.repeats):
        for idea in IDEAS:
            command = [sys.executable, __file__, "--shape", options.shape, "--idea", idea]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[idea].append(json.loads(output.splitlines()[-1]))
            emit(BENCHMARK, shape=options.shape, idea=idea, repeat=repeat, **found[idea][-1])
    base = found["as it is"]
    for idea, runs in found.items():
        speed = statistics.median(
            run["tokens_per_s"] / one["tokens_per_s"] for run, one in zip(runs, base, strict=True)
        )
        memory = statistics.median(run["peak_bytes"] / one["peak_bytes"] for run, one in zip(runs, base, strict=True))
        tokens_per_s = statistics.median(run["tokens_per_s"] for run in runs)
        print(f"{idea}: {tokens_per_s:.0f} tokens/s, {speed:.2f} x, memory {memory:.2f} x ({IDEAS[idea]})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
