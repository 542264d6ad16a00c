"""What is measured of a run: how many of its layers, and which micro-batches of its own rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.models.precision import matrix_seconds
from lorasmith.engine.training.computation import Computation
from lorasmith.engine.training.devices import Devices
from lorasmith.engine.training.estimation.memory import available_bytes
from lorasmith.engine.training.estimation.shape import RunShape
from lorasmith.engine.training.estimation.skeleton import layer_weights

WHOLE_MODEL_LAYERS = 8  # models with so few layers are measured whole
SEVERAL_LAYERS = 4
MEASURED_SHARE = 0.3  # of the available memory, which measuring may take
PROBE_FLOPS = 2 * 512 * 1024 * 2048  # of `matrix_seconds`
FIRST_SHARE = 0.15  # of the budget, which one measurement may take

Batch = list[int]


@dataclass(frozen=True)
class Sample:
    """Layers and vocabulary of the model that is measured, and rows of micro-batches, the largest first.

    `batches` are what the processes compute at the same time, by rank; a process that has nothing then has no rows.
    `alone` is what one process would compute at once, were there no other.
    """

    layers: int
    vocabulary: int
    batches: list[list[Batch]]
    alone: Batch


class TooLargeToMeasure(Exception):
    """Why not even a few layers can be measured here."""


def choose_sample(shape: RunShape, budget_s: float) -> Sample:
    """Micro-batches that can be afforded. Raises `TooLargeToMeasure`."""
    layers, vocabulary = measured_layers(shape)
    computation, rows = shape.computation(), shape.part.rows
    limit = affordable_tokens(shape, layers, budget_s)
    batches = [[cut_to(batch, rows, limit) for batch in of_each] for of_each in chosen_batches(shape, computation)]
    whole = computation.micro_batches(shape.plan.row_indices(0), rows)
    return Sample(layers, vocabulary, batches, cut_to(max(whole, key=lambda b: tokens_of(b, rows)), rows, limit))


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
        model = layers * weights + 2 * vocabulary * hidden
        return float(model * shape.dtype.itemsize * copies * shape.processes)

    while needed(layers, vocabulary) > room and layers > 2:
        layers -= 1
    while needed(layers, vocabulary) > room and vocabulary > 1024:
        vocabulary //= 2
    if needed(layers, vocabulary) > room:
        in_processes = f" in {shape.processes} processes" if shape.processes > 1 else ""
        raise TooLargeToMeasure(
            f"two of its layers take {needed(2, 1024) / 1e9:.1f} GB{in_processes}, and {room / 1e9:.1f} GB are free for measuring"
        )
    return layers, vocabulary


def chosen_batches(shape: RunShape, computation: Computation) -> list[list[Batch]]:
    """Micro-batches of the first steps, the largest first and the others in random order: a fair sample."""
    rows, together = shape.part.rows, Devices(count=shape.processes)
    batches: list[list[Batch]] = []
    for step in range(min(shape.plan.total_steps, 8 + 64 // shape.plan.step_rows)):
        dealt = together.shares(shape.plan.row_indices(step), rows)
        of_each = (computation.micro_batches(share, rows) for share in dealt)
        batches += (list(at_a_time) for at_a_time in zip_longest(*of_each, fillvalue=[]))
    largest = max(batches, key=lambda of_each: most_tokens(of_each, rows))
    others = [of_each for of_each in batches if of_each is not largest]
    random.Random(0).shuffle(others)
    return [largest, *others]


def most_tokens(of_each: Sequence[Batch], rows: Sequence[RenderedExample]) -> int:
    """Of the process that has most."""
    return max(tokens_of(batch, rows) for batch in of_each)


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
    flops_per_s = PROBE_FLOPS / matrix_seconds(shape.precision)
    per_token = 4 * (layer_weights(shape.base, shape.layers) * layers + head_elements(shape))
    return max(1, int(FIRST_SHARE * budget_s * flops_per_s / per_token))


def head_elements(shape: RunShape) -> int:
    return int(shape.base.config.vocab_size * shape.base.config.hidden_size)
