"""Seconds of a run, from a few random layers of the real shape on micro-batches of the real rows.

A step costs c + n · g: n layers with their gradient, and c for embedding, head and loss. Both come from the same micro-batches
computed with one layer and with several; where the whole model is small, all of its layers are measured and nothing is scaled.

Several processes measure at the same time, with the threads that each has in the run, as they take memory bandwidth from each
other; what counts is the one that the others wait for.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.data.rows import row_lengths
from lorasmith.engine.lora.quantized import AS_STORED
from lorasmith.engine.models.elementwise import EAGER, Elementwise
from lorasmith.engine.models.elementwise import compiled as elementwise_compiled
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.checkpoints import Progress, save_checkpoint, trainable
from lorasmith.engine.training.choices import Choices, choose_computation
from lorasmith.engine.training.computation import Computation, PackedComputation
from lorasmith.engine.training.devices import Devices
from lorasmith.engine.training.estimation.memory import optimizer_bytes, resident_bytes
from lorasmith.engine.training.estimation.random_model import Vocabulary, random_model
from lorasmith.engine.training.estimation.rehearsal import heap_growth
from lorasmith.engine.training.estimation.sample import Batch, Sample, most_tokens
from lorasmith.engine.training.estimation.several import seconds, slowest
from lorasmith.engine.training.estimation.shape import RunShape
from lorasmith.engine.training.optimizers import build_optimizer
from lorasmith.files import folder_size_bytes
from lorasmith.schemas.training import TrainingSettings

REHEARSED_BATCHES = 3
LAST_SHARE = 0.9  # of the budget, after which no further micro-batch is begun
LAST_SHARE_OF_SEVERAL = 0.7  # processes, which also measure what they say to each other and what one alone would take


@dataclass(frozen=True)
class Rates:
    """Measured seconds: per token and layer, per token for all else, per trained element of an update, per checkpoint byte."""

    layer_s: float
    rest_s: float
    forward_layer_s: float
    forward_rest_s: float
    update_s: float
    save_s: float
    first_s: float  # what the first step takes more, for what is compiled then
    spread: float
    measured_s: float
    layers: int
    exchange_s: float = 0.0  # of a step: what several processes tell each other
    reduce_s: float = 0.0  # per trained element: summing gradients over them
    alone: float = 1.0  # what a token takes in one process with all cores, as a share of what it takes here


@dataclass(frozen=True)
class Small:
    """A model of a few layers of the run's shape, computed with all of them and with one."""

    layers: int
    all: Computation
    one: Computation | None  # None where all layers of the model are measured
    model: PeftModel
    rows: Sequence[RenderedExample]
    head_factor: float  # by how much the real vocabulary is larger


def small_model(
    shape: RunShape,
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    report: Reporter,
    devices: Devices,
) -> Small:
    """Random weights, and everything else as the run has it, measured choices included."""
    layers, vocabulary = sample.layers, sample.vocabulary
    rows: Sequence[RenderedExample] = shape.part.rows
    if vocabulary < shape.base.config.vocab_size:
        rows = [replace(row, ids=[token % vocabulary for token in row.ids]) for row in rows]
    settings = shape.spec.training.model_copy(
        update={"prefix_cache_gb": 0, "compile": "on" if shape.compiled else "off"}
    )
    choices, words = Choices(folder, report, devices), Vocabulary(tokenizer, vocabulary)
    choices.made |= {"memory": shape.memory, "weights": "stored" if shape.quantization == AS_STORED else "converted"}

    def computed(model: PeftModel) -> Computation:
        return choose_computation(choices, model, words, settings, shape.precision, rows, report)  # type: ignore[arg-type]

    model = random_model(shape, layers, vocabulary, folder)
    computation = computed(model)
    one: Computation | None = None
    if layers < shape.layers:
        packed = isinstance(computation, PackedComputation)
        one = one_layer(computation, settings) if packed else computed(random_model(shape, 1, vocabulary, folder))
    return Small(layers, computation, one, model, rows, shape.base.config.vocab_size / vocabulary)


def one_layer(computation: Any, settings: TrainingSettings) -> PackedComputation:
    """The same with the top layer alone."""
    decoder = computation.decoder.decoder
    one = PackedComputation(
        replace(decoder, layers=decoder.layers[-1:]),
        seed=settings.seed,
        micro_batch_tokens=settings.micro_batch_tokens,
        recompute=settings.gradient_checkpointing,
    )
    for name in ("elementwise", "kept_tokens", "head_tokens"):
        setattr(one.decoder, name, getattr(computation.decoder, name))
    return one


def measure(
    shape: RunShape, small: Small, sample: Sample, devices: Devices, folder: Path, budget_s: float, report: Reporter
) -> Rates:
    """Compute micro-batches until the budget is spent; the first again at the end."""
    began = time.perf_counter()
    rows, batches = small.rows, sample.batches

    def gradient_s(computation: Computation, of_each: list[Batch]) -> float:
        batch = of_each[devices.rank]
        return slowest(devices, lambda: batch and computation.gradients(batch, rows, scale=1e-3, step=0))

    def forward_s(computation: Computation, of_each: list[Batch]) -> float:
        batch = of_each[devices.rank]
        return slowest(devices, lambda: batch and computation.loss(batch, rows))

    warm = gradient_s(small.all, batches[0])
    first = [gradient_s(small.all, batches[0])]
    samples: list[tuple[int, float, float]] = []  # tokens, with all layers, with one
    checks: list[tuple[int, float, float]] = []
    last_share = LAST_SHARE if devices.count == 1 else LAST_SHARE_OF_SEVERAL
    for number, of_each in enumerate([*batches, *batches]):
        spent = devices.agree(time.perf_counter() - began)
        if number >= 2 and spent > budget_s * last_share:
            break
        tokens = most_tokens(of_each, rows)
        # Several layers meet the shapes first, as in a run; one layer then has what was compiled for them.
        alone_before = gradient_s(small.one, of_each) if small.one else 0.0
        every = gradient_s(small.all, of_each)
        alone = gradient_s(small.one, of_each) if small.one else 0.0
        samples.append((tokens, every + max(0.0, alone_before - alone), alone))
        if number % 4 == 0:
            forward_one = forward_s(small.one, of_each) if small.one else 0.0
            checks.append((tokens, forward_s(small.all, of_each), forward_one))
        if number % 8 == 4:
            first.append(gradient_s(small.all, batches[0]))
        report("progress", condition="measuring", done=min(budget_s, round(spent, 1)), total=budget_s)
    first.append(gradient_s(small.all, batches[0]))
    layer_s, rest_s = split(samples, small)
    forward_layer_s, forward_rest_s = split(checks, small)
    update_s, save_s = update_and_save(small, devices, folder, shape.spec.training)
    return Rates(
        layer_s=layer_s,
        rest_s=rest_s * small.head_factor,
        forward_layer_s=forward_layer_s,
        forward_rest_s=forward_rest_s * small.head_factor,
        update_s=update_s,
        save_s=save_s,
        first_s=max(0.0, warm - first[0]) if shape.compiled else 0.0,
        spread=(max(first) - min(first)) / min(first),
        measured_s=time.perf_counter() - began,
        layers=small.layers,
    )


def split(samples: list[tuple[int, float, float]], small: Small) -> tuple[float, float]:
    """Seconds per token of a layer and of all else."""
    tokens = sum(sample[0] for sample in samples)
    every, alone = (sum(sample[which] for sample in samples) / tokens for which in (1, 2))
    if small.one is None:
        return every / small.layers, 0.0
    layer = max(0.0, (every - alone) / (small.layers - 1))
    return layer, every - small.layers * layer


def expected_growth(shape: RunShape, small: Small, batches: list[Batch]) -> int:
    """Bytes that measuring takes by the rules of `estimate_memory`; what it takes more belongs to libraries.

    Has to be called before anything is measured.
    """
    computations = [small.all, *([small.one] if small.one else [])]
    for computation in computations:
        set_elementwise(computation, EAGER)  # what is compiled cannot be rehearsed
    rehearsed = heap_growth(
        lambda: partial(compute_all, computations, batches[:REHEARSED_BATCHES], small.rows),
        retained=shape.decoder is not None,
    )
    for computation in computations:
        set_elementwise(computation, elementwise_compiled() if shape.compiled else EAGER)
    states = [
        optimizer_bytes(shape.spec.training.optimizer, tuple(parameter.shape))
        for parameter in trainable(small.model).values()
    ]
    return rehearsed + 2 * sum(states)  # once more in the copies of a checkpoint


def compile_parts(shape: RunShape, small: Small) -> tuple[int, float]:
    """Bytes and seconds that compiling takes: the shortest row is computed for the first time.

    Apart from what is measured next, where buffers of a rehearsal that are never filled would hide it.
    """
    if not shape.compiled or not isinstance(small.all, PackedComputation):
        return 0, 0.0
    lengths = row_lengths(small.rows)
    shortest = min(range(len(lengths)), key=lambda index: lengths[index])
    before, began = resident_bytes(), time.perf_counter()
    small.all.gradients([shortest], small.rows, scale=1e-3, step=0)
    took_s = time.perf_counter() - began
    grown = resident_bytes() - before - small.all.decoder.workspace.size_bytes
    small.all.free()
    return max(0, grown), took_s


def set_elementwise(computation: Computation, elementwise: Elementwise) -> None:
    if isinstance(computation, PackedComputation):
        computation.decoder.elementwise = elementwise


def compute_all(computations: list[Computation], batches: list[list[int]], rows: Sequence[RenderedExample]) -> None:
    for batch in batches:
        for computation in computations:
            computation.gradients(batch, rows, scale=1e-3, step=0)
            computation.loss(batch, rows)


def update_and_save(small: Small, devices: Devices, folder: Path, settings: TrainingSettings) -> tuple[float, float]:
    """Seconds of an update per trained element, and of a checkpoint per byte of it, each as the run makes them."""
    parameters = trainable(small.model)
    optimizer = build_optimizer(settings.optimizer, parameters, rate=1e-6, weight_decay=0.0)
    elements = sum(parameter.numel() for parameter in parameters.values())

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        optimizer.step()

    update()  # allocates
    update_s = statistics.median(slowest(devices, update) for _ in range(3)) / elements

    def per_byte() -> float:
        save_s = seconds(lambda: save_checkpoint(folder, small.model, optimizer, Progress(step=1), 1, {}))
        return save_s / folder_size_bytes(folder / "checkpoints")

    return update_s, devices.found_by_first(per_byte)
