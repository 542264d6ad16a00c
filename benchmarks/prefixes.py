"""What rows gain from a shared beginning, and later epochs from frozen layers: our step against itself without.

python benchmarks/prefixes.py [--repeats N] [--shared-shape S] [--frozen-shape S]: JSON lines, one closing line per bar,
exit 1 when short. Both are exact at dropout 0, which tests/engine/test_models_decoder.py and test_models_prefix_cache.py
hold against PEFT.

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
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import workload
from peft import LoraConfig, PeftModel, get_peft_model
from report import Bar, close, emit
from transformers import AutoConfig, AutoModelForCausalLM

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.models.families import Decoder, multiply_in_integers, read_decoder
from lorasmith.engine.models.precision import DTYPES, choose_precision
from lorasmith.engine.models.prefix_cache import PrefixCache
from lorasmith.engine.models.workspace import retain_heap
from lorasmith.engine.training.computation import PackedComputation

BENCHMARK = "prefixes"
auto_precision = cache(partial(choose_precision, "auto"))  # measured once: the runs of a benchmark are alike
SHARED_BAR, FROZEN_BAR = 1.9, 2.5
ALL_AT_ONCE = 8192  # tokens of a micro-batch


def adapted_model(values: workload.Config, **lora: Any) -> PeftModel:
    """Random weights in this machine's faster precision, with a fresh adapter."""
    config = AutoConfig.for_model(**values)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config, dtype=DTYPES[auto_precision()])
    settings = LoraConfig(
        r=workload.LORA_RANK, lora_alpha=workload.LORA_ALPHA, target_modules=list(workload.LORA_MODULES), **lora
    )
    model = get_peft_model(base.requires_grad_(False), settings)
    assert isinstance(model, PeftModel)
    return model


def read_and_set(model: PeftModel) -> Decoder:
    """With products in this machine's faster precision."""
    decoder = read_decoder(model)
    if auto_precision() == "int16":
        multiply_in_integers(decoder)
    return decoder


def make_rows(count: int, tokens: int, shared: int, labelled: int, vocabulary: int) -> list[RenderedExample]:
    """Rows of equal length with a common beginning, the last `labelled` tokens trained."""
    generator = random.Random(0)
    beginning = [generator.randrange(vocabulary) for _ in range(shared)]
    rows = []
    for number in range(count):
        ids = beginning + [generator.randrange(vocabulary) for _ in range(tokens - shared)]
        rows.append(RenderedExample(number, ids, [index >= tokens - labelled for index in range(tokens)]))
    return rows


def step_seconds(computation: PackedComputation, rows: list[RenderedExample]) -> float:
    """Gradients of all rows, one optimizer step's worth."""
    began = time.perf_counter()
    for group in computation.micro_batches(range(len(rows)), rows):
        computation.gradients(group, rows, scale=1e-3, step=0)
    return time.perf_counter() - began


def shared_seconds(shape: str, repeats: int) -> Iterator[tuple[float, float]]:
    """Seconds of a step whose rows share their beginning, and of the same step without sharing."""
    config = workload.SHAPES[shape]
    rows = make_rows(16, 300, 180, 120, config["vocab_size"])
    shared = PackedComputation(read_and_set(adapted_model(config)), seed=0, micro_batch_tokens=ALL_AT_ONCE)
    apart_decoder = read_and_set(adapted_model(config))
    apart_decoder.rotary_by_length = True  # what keeps rows of such families apart
    apart = PackedComputation(apart_decoder, seed=0, micro_batch_tokens=ALL_AT_ONCE)
    for computation in (shared, apart):
        step_seconds(computation, rows)  # allocates
    for _ in range(repeats):
        yield step_seconds(shared, rows), step_seconds(apart, rows)


def frozen_seconds(shape: str, repeats: int) -> Iterator[tuple[float, float]]:
    """Seconds of epoch 2, which reads what the frozen layers computed, and of epoch 1, which computes and keeps it."""
    config = workload.SHAPES[shape]
    layers = config["num_hidden_layers"]
    rows = make_rows(8, 400, 0, 80, config["vocab_size"])
    top = list(range(layers - max(1, layers // 4), layers))
    decoder = read_and_set(adapted_model(config, layers_to_transform=top))
    step_seconds(PackedComputation(decoder, seed=0, micro_batch_tokens=ALL_AT_ONCE), rows)  # allocates
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            lengths = [len(row.ids) for row in rows]
            prefixes = PrefixCache(Path(folder), lengths, decoder.embedding.shape[1], decoder.dtype, 10**10)
            computation = PackedComputation(decoder, seed=0, micro_batch_tokens=ALL_AT_ONCE, cache=prefixes)
            first = step_seconds(computation, rows)
            yield step_seconds(computation, rows), first


def faster_bar(name: str, peer: str, shape: str, measured: Iterator[tuple[float, float]], bar: float) -> Bar:
    """How many times as fast as `peer` the median pair of seconds is."""
    pairs = []
    for ours_s, peer_s in measured:
        pairs.append((ours_s, peer_s))
        emit(BENCHMARK, run=name, shape=shape, repeat=len(pairs), ours_s=ours_s, peer_s=peer_s)
    ours_median, peer_median = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    ratio = statistics.median(peer_s / ours_s for ours_s, peer_s in pairs)
    return Bar(name, f"{ours_median:.3g} s", f"{peer_median:.3g} s ({peer})", ratio, bar)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shared-shape", choices=workload.SHAPES, default="smollm2-135m")
    parser.add_argument("--frozen-shape", choices=workload.SHAPES, default="tinyllama-1.1b")
    options = parser.parse_args()
    retain_heap()
    shared = shared_seconds(options.shared_shape, options.repeats)
    frozen = frozen_seconds(options.frozen_shape, options.repeats)
    return close(
        [
            faster_bar("shared beginning of 60 %", "not shared", options.shared_shape, shared, SHARED_BAR),
            faster_bar("top quarter adapted, epoch 2", "epoch 1", options.frozen_shape, frozen, FROZEN_BAR),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
