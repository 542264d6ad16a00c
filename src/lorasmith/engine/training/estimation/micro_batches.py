"""What the processes of a run compute in each step and in a validation, and which of it a rehearsal goes through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.data.rows import row_lengths
from lorasmith.engine.models.attention import KEPT_TOKENS
from lorasmith.engine.training.batches import StepPlan
from lorasmith.engine.training.computation import Computation
from lorasmith.engine.training.devices import shares
from lorasmith.engine.training.estimation.shape import RunShape

GROWTH = 1.2  # a micro-batch so much larger than all before is rehearsed
NEARLY_THE_LARGEST = 1.02  # and the largest, unless one was rehearsed that is nearly as large


def growing_batches(computation: Computation, shape: RunShape) -> list[list[int]]:
    """Micro-batches of the first epoch, in its order, that are larger than all before: in tokens, labels or attention.

    Those of any process: the share of each is nearly as large in the long run.
    """
    rows = shape.part.rows
    batches = (
        batch for dealt in dealt_steps(shape) for share in dealt for batch in computation.micro_batches(share, rows)
    )
    return records(batches, rows)


def dealt_steps(shape: RunShape) -> Iterator[list[list[int]]]:
    """Rows of each step of the first epoch, by the rank of the process that computes them."""
    plan, lengths = shape.plan, row_lengths(shape.part.rows)
    order = first_epoch(plan)
    for start in range(0, min(len(order), plan.total_steps * plan.step_rows), plan.step_rows):
        indices = order[start : start + plan.step_rows]
        yield shares(indices, [lengths[index] for index in indices], shape.processes)


def dealt_validation(shape: RunShape) -> list[list[int]]:
    """Rows of the validation part, by the rank of the process that computes them."""
    lengths = row_lengths(shape.validation)
    return shares(range(len(lengths)), lengths, shape.processes)


def slowest_share(shape: RunShape) -> float:
    """Of the tokens of all steps, those that a step waits for: of the process that has most of it."""
    if shape.processes == 1:
        return 1.0
    lengths = row_lengths(shape.part.rows)
    loads = [[sum(lengths[index] for index in share) for share in dealt] for dealt in dealt_steps(shape)]
    return sum(map(max, loads)) / sum(map(sum, loads))


def first_epoch(plan: StepPlan) -> list[int]:
    """Every row in the order of the first epoch, shuffled once."""
    return replace(plan, step_rows=plan.rows).row_indices(0)


def records(batches: Iterator[list[int]], rows: Sequence[RenderedExample]) -> list[list[int]]:
    """Those that are much larger than all before, and of each measure the largest."""
    kept: list[list[int]] = []
    kept_at = [0.0, 0.0, 0.0]
    largest: dict[int, tuple[float, list[int]]] = {}
    for batch in batches:
        lengths = [len(rows[index].ids) for index in batch]
        sizes = [
            float(sum(lengths)),
            float(sum(rows[index].trained_tokens for index in batch)),
            float(sum(length * length if length <= KEPT_TOKENS else length * KEPT_TOKENS for length in lengths)),
        ]
        if any(size > GROWTH * before for size, before in zip(sizes, kept_at, strict=True)):
            kept.append(batch)
            kept_at = [max(pair) for pair in zip(sizes, kept_at, strict=True)]
        for measure, size in enumerate(sizes):
            if size > largest.get(measure, (0.0, []))[0]:
                largest[measure] = size, batch
    for measure, (size, batch) in largest.items():
        if size > NEARLY_THE_LARGEST * kept_at[measure] and batch not in kept:
            kept.append(batch)
    return kept
