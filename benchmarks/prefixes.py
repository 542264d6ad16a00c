"""What rows gain from a shared beginning, and later epochs from frozen layers: our step against itself without.

python benchmarks/prefixes.py [--repeats N]: JSON lines, one closing line per bar, exit 1 when short. Both are exact at
dropout 0, which tests/engine/test_models_decoder.py and test_models_prefix_cache.py hold against PEFT.

Shared: 16 rows a step of 300 tokens, the first 180 of them the same; without any other cost than tokens the gain would be
16 · 300 / (180 + 16 · 120) = 2.29. Frozen: adapters on the top quarter of the layers, epoch 2 against epoch 1 of 8 rows of
400 tokens, a fifth of them labelled.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import workload
from peft import LoraConfig, PeftModel, get_peft_model
from report import Bar, close, emit
from transformers import AutoConfig, AutoModelForCausalLM

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.models.families import Decoder, read_decoder
from lorasmith.engine.models.precision import DTYPES, choose_precision
from lorasmith.engine.models.prefix_cache import PrefixCache
from lorasmith.engine.models.workspace import retain_heap
from lorasmith.engine.training.computation import PackedComputation

BENCHMARK = "prefixes"
SHARED_BAR, FROZEN_BAR = 1.9, 0.4
ALL_AT_ONCE = 8192  # tokens of a micro-batch


def adapted_model(values: workload.Config, **lora: Any) -> PeftModel:
    """Random weights in this machine's faster precision, with a fresh adapter."""
    config = AutoConfig.for_model(**values)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=DTYPES[choose_precision("auto")])
    settings = LoraConfig(
        r=workload.LORA_RANK, lora_alpha=workload.LORA_ALPHA, target_modules=list(workload.LORA_MODULES), **lora
    )
    model = get_peft_model(base.requires_grad_(False), settings)
    assert isinstance(model, PeftModel)
    return model


def make_rows(count: int, tokens: int, shared: int, labelled: int, vocabulary: int) -> list[RenderedExample]:
    """Rows of equal length with a common beginning, the last `labelled` tokens trained."""
    generator = random.Random(0)
    beginning = [generator.randrange(vocabulary) for _ in range(shared)]
    rows = []
    for number in range(count):
        ids = beginning + [generator.randrange(vocabulary) for _ in range(tokens - shared)]
        rows.append(RenderedExample(str(number), number, ids, [index >= tokens - labelled for index in range(tokens)]))
    return rows


def step_seconds(computation: PackedComputation, rows: list[RenderedExample]) -> float:
    """Gradients of all rows, one optimizer step's worth."""
    began = time.perf_counter()
    for group in computation.micro_batches(range(len(rows)), rows):
        computation.gradients(group, rows, scale=1e-3, step=0)
    return time.perf_counter() - began


def shared_bar(shape: str, repeats: int) -> Bar:
    rows = make_rows(16, 300, 180, 120, workload.SHAPES[shape]["vocab_size"])
    shared = PackedComputation(
        read_decoder(adapted_model(workload.SHAPES[shape])), seed=0, micro_batch_tokens=ALL_AT_ONCE
    )
    apart_decoder: Decoder = read_decoder(adapted_model(workload.SHAPES[shape]))
    apart_decoder.rotary_by_length = True  # what keeps rows of such families apart
    apart = PackedComputation(apart_decoder, seed=0, micro_batch_tokens=ALL_AT_ONCE)
    ratios, ours, peer = [], [], []
    for repeat in range(repeats + 1):
        seconds = {"shared": step_seconds(shared, rows), "apart": step_seconds(apart, rows)}
        if repeat == 0:
            continue  # allocates
        emit(BENCHMARK, run="shared beginning", shape=shape, repeat=repeat, **seconds)
        ours.append(seconds["shared"])
        peer.append(seconds["apart"])
        ratios.append(seconds["apart"] / seconds["shared"])
    return Bar(
        "shared beginning of 60 %",
        f"{statistics.median(ours):.2f} s",
        f"{statistics.median(peer):.2f} s (not shared)",
        statistics.median(ratios),
        SHARED_BAR,
    )


def frozen_bar(shape: str, repeats: int) -> Bar:
    layers = workload.SHAPES[shape]["num_hidden_layers"]
    rows = make_rows(8, 400, 0, 80, workload.SHAPES[shape]["vocab_size"])
    decoder = read_decoder(
        adapted_model(workload.SHAPES[shape], layers_to_transform=list(range(layers - layers // 4, layers)))
    )
    step_seconds(PackedComputation(decoder, seed=0, micro_batch_tokens=ALL_AT_ONCE), rows)  # allocates
    ratios, first, second = [], [], []
    for repeat in range(1, repeats + 1):
        with tempfile.TemporaryDirectory() as folder:
            lengths = [len(row.ids) for row in rows]
            cache = PrefixCache(Path(folder), lengths, decoder.embedding.shape[1], decoder.dtype, 10**10)
            computation = PackedComputation(decoder, seed=0, micro_batch_tokens=ALL_AT_ONCE, cache=cache)
            seconds = {"epoch_1": step_seconds(computation, rows), "epoch_2": step_seconds(computation, rows)}
        emit(BENCHMARK, run="frozen layers", shape=shape, repeat=repeat, **seconds)
        first.append(seconds["epoch_1"])
        second.append(seconds["epoch_2"])
        ratios.append(seconds["epoch_2"] / seconds["epoch_1"])
    return Bar(
        "epoch 2 with the top quarter adapted",
        f"{statistics.median(second):.2f} s",
        f"{statistics.median(first):.2f} s (epoch 1)",
        statistics.median(ratios),
        FROZEN_BAR,
        at_least=False,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shared-shape", choices=workload.SHAPES, default="smollm2-135m")
    parser.add_argument("--frozen-shape", choices=workload.SHAPES, default="tinyllama-1.1b")
    options = parser.parse_args()
    retain_heap()
    return close([shared_bar(options.shared_shape, options.repeats), frozen_bar(options.frozen_shape, options.repeats)])


if __name__ == "__main__":
    sys.exit(main())
