"""Seconds of a run, from a few random layers of the real shape on micro-batches of the real rows.

A step costs c + n · g: n layers with their gradient, and c for embedding, head and loss. Both come from the same micro-batches
computed with one layer and with several; where the whole model is small, all of its layers are measured and nothing is scaled.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.models.elementwise import EAGER, Elementwise
from lorasmith.engine.models.elementwise import compiled as elementwise_compiled
from lorasmith.engine.models.precision import matrix_seconds
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.checkpoints import Progress, save_checkpoint, trainable
from lorasmith.engine.training.choices import Choices, choose_computation
from lorasmith.engine.training.computation import Computation, PackedComputation
from lorasmith.engine.training.devices import Devices
from lorasmith.engine.training.estimation.memory import available_bytes, optimizer_bytes
from lorasmith.engine.training.estimation.random_model import Vocabulary, random_model
from lorasmith.engine.training.estimation.rehearsal import heap_growth
from lorasmith.engine.training.estimation.shape import RunShape
from lorasmith.engine.training.estimation.skeleton import layer_weights
from lorasmith.engine.training.optimizers import build_optimizer
from lorasmith.files import folder_size_bytes
from lorasmith.schemas.training import TrainingSettings

WHOLE_MODEL_LAYERS = 8  # models with so few layers are measured whole
SEVERAL_LAYERS = 4
MEASURED_SHARE = 0.3  # of the available memory, which measuring may take
PROBE_FLOPS = 2 * 512 * 1024 * 2048  # of `matrix_seconds`
REHEARSED_BATCHES = 3
FIRST_SHARE = 0.15  # of the budget, which one measurement may take


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


@dataclass(frozen=True)
class Small:
    """A model of a few layers of the run's shape, computed with all of them and with one."""

    layers: int
    all: Computation
    one: Computation | None  # None where all layers of the model are measured
    model: PeftModel
    rows: Sequence[RenderedExample]
    head_factor: float  # by how much the real vocabulary is larger


class TooLargeToMeasure(Exception):
    """Why not even a few layers can be measured here."""


def measured_layers(shape: RunShape) -> tuple[int, int]:
    """How many layers are measured, and with which vocabulary. Raises `TooLargeToMeasure`."""
    whole = shape.layers <= WHOLE_MODEL_LAYERS
    layers = shape.layers if whole else SEVERAL_LAYERS
    vocabulary = shape.base.config.vocab_size
    room = MEASURED_SHARE * available_bytes()
    weights = layer_weights(shape.base, shape.layers)
    hidden = shape.base.config.hidden_size
    copies = 3 if shape.memory == "fast" else 2

    def needed(layers: int, vocabulary: int) -> float:
        return float((layers * weights + 2 * vocabulary * hidden) * shape.dtype.itemsize * copies)

    while needed(layers, vocabulary) > room and layers > 2:
        layers -= 1
    while needed(layers, vocabulary) > room and vocabulary > 1024:
        vocabulary //= 2
    if needed(layers, vocabulary) > room:
        raise TooLargeToMeasure(
            f"two of its layers take {needed(2, 1024) / 1e9:.1f} GB, and {room / 1e9:.1f} GB are free for measuring"
        )
    return layers, vocabulary


def small_model(shape: RunShape, tokenizer: PreTrainedTokenizerBase, folder: Path, report: Reporter) -> Small:
    """Random weights, and everything else as the run has it, measured choices included."""
    layers, vocabulary = measured_layers(shape)
    rows: Sequence[RenderedExample] = shape.part.rows
    if vocabulary < shape.base.config.vocab_size:
        rows = [replace(row, ids=[token % vocabulary for token in row.ids]) for row in rows]
    settings = shape.spec.training.model_copy(
        update={"prefix_cache_gb": 0, "memory": shape.memory, "compile": "on" if shape.compiled else "off"}
    )
    choices, words = Choices(folder, report, Devices()), Vocabulary(tokenizer, vocabulary)

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
    one.decoder.elementwise, one.decoder.kept_tokens = computation.decoder.elementwise, computation.decoder.kept_tokens
    return one


def chosen_batches(shape: RunShape, computation: Computation) -> list[list[int]]:
    """Micro-batches of the first steps, the largest first and the others in random order: a fair sample."""
    steps = range(min(shape.plan.total_steps, 8 + 64 // shape.plan.step_rows))
    batches = [
        batch for step in steps for batch in computation.micro_batches(shape.plan.row_indices(step), shape.part.rows)
    ]
    largest = max(batches, key=lambda batch: tokens_of(batch, shape.part.rows))
    others = [batch for batch in batches if batch is not largest]
    random.Random(0).shuffle(others)
    return [largest, *others]


def tokens_of(batch: list[int], rows: Sequence[RenderedExample]) -> int:
    return sum(len(rows[index].ids) for index in batch)


def cut_to(batch: list[int], rows: Sequence[RenderedExample], tokens: int) -> list[int]:
    """As many rows of the batch as have at most so many tokens, at least one."""
    kept: list[int] = []
    for index in batch:
        if kept and tokens_of([*kept, index], rows) > tokens:
            break
        kept.append(index)
    return kept


def affordable_tokens(shape: RunShape, layers: int, budget_s: float) -> int:
    """How many tokens one measurement may have."""
    flops_per_s = PROBE_FLOPS / matrix_seconds(shape.dtype)
    per_token = 4 * (layer_weights(shape.base, shape.layers) * layers + head_elements(shape))
    return max(1, int(FIRST_SHARE * budget_s * flops_per_s / per_token))


def head_elements(shape: RunShape) -> int:
    return int(shape.base.config.vocab_size * shape.base.config.hidden_size)


def measure(
    shape: RunShape, small: Small, batches: list[list[int]], folder: Path, budget_s: float, report: Reporter
) -> Rates:
    """Compute micro-batches until the budget is spent; the first again at the end."""
    began = time.perf_counter()
    rows = small.rows
    warm = seconds(lambda: small.all.gradients(batches[0], rows, scale=1e-3, step=0))
    first = [gradient_seconds(small.all, batches[0], rows)]
    samples: list[tuple[int, float, float]] = []  # tokens, with all layers, with one
    checks: list[tuple[int, float, float]] = []
    for number, batch in enumerate([*batches, *batches]):
        spent = time.perf_counter() - began
        if number >= 2 and spent > budget_s * 0.9:
            break
        tokens = tokens_of(batch, rows)
        # Several layers meet the shapes first, as in a run; one layer then has what was compiled for them.
        alone_before = gradient_seconds(small.one, batch, rows) if small.one else 0.0
        every = gradient_seconds(small.all, batch, rows)
        alone = gradient_seconds(small.one, batch, rows) if small.one else 0.0
        samples.append((tokens, every + max(0.0, alone_before - alone), alone))
        if number % 4 == 0:
            forward_one = forward_seconds(small.one, batch, rows) if small.one else 0.0
            checks.append((tokens, forward_seconds(small.all, batch, rows), forward_one))
        if number % 8 == 4:
            first.append(gradient_seconds(small.all, batches[0], rows))
        report("progress", condition="measuring", done=min(budget_s, round(spent, 1)), total=budget_s)
    first.append(gradient_seconds(small.all, batches[0], rows))
    layer_s, rest_s = split(samples, small)
    forward_layer_s, forward_rest_s = split(checks, small)
    update_s, save_s = update_and_save(small, folder, shape.spec.training)
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


def expected_growth(shape: RunShape, small: Small, batches: list[list[int]]) -> int:
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


def set_elementwise(computation: Computation, elementwise: Elementwise) -> None:
    if isinstance(computation, PackedComputation):
        computation.decoder.elementwise = elementwise


def compute_all(computations: list[Computation], batches: list[list[int]], rows: Sequence[RenderedExample]) -> None:
    for batch in batches:
        for computation in computations:
            computation.gradients(batch, rows, scale=1e-3, step=0)
            computation.loss(batch, rows)


def measured_batches(shape: RunShape, budget_s: float) -> list[list[int]]:
    """Rows of the micro-batches that are measured, each affordable. Raises `TooLargeToMeasure`."""
    layers, _ = measured_layers(shape)
    rows: Sequence[RenderedExample] = shape.part.rows
    limit = affordable_tokens(shape, layers, budget_s)
    return [cut_to(batch, rows, limit) for batch in chosen_batches(shape, shape.computation())]


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def gradient_seconds(computation: Computation, batch: list[int], rows: Sequence[RenderedExample]) -> float:
    return seconds(lambda: computation.gradients(batch, rows, scale=1e-3, step=0))


def forward_seconds(computation: Computation, batch: list[int], rows: Sequence[RenderedExample]) -> float:
    return seconds(lambda: computation.loss(batch, rows))


def update_and_save(small: Small, folder: Path, settings: TrainingSettings) -> tuple[float, float]:
    """Seconds of an update per trained element, and of a checkpoint per byte of it, each as the run makes them."""
    parameters = trainable(small.model)
    optimizer = build_optimizer(settings.optimizer, parameters, rate=1e-6, weight_decay=0.0)
    elements = sum(parameter.numel() for parameter in parameters.values())

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        optimizer.step()

    update()  # allocates
    update_s = statistics.median(seconds(update) for _ in range(3)) / elements
    save_s = seconds(lambda: save_checkpoint(folder, small.model, optimizer, Progress(step=1), 1, {}))
    return update_s, save_s / folder_size_bytes(folder / "checkpoints")
