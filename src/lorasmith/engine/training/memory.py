"""Micro-batches that fit into memory: where it runs out, the same sum is computed in smaller parts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.models.workspace import release_heap
from lorasmith.engine.out_of_memory import ran_out_of_memory
from lorasmith.engine.training.batches import StepPlan
from lorasmith.engine.training.computation import Computation
from lorasmith.engine.training.devices import Devices
from lorasmith.errors import JobFailed

STEPS_LOOKED_AT = 64  # for the largest micro-batch; finding the rows of a step costs a shuffle of all of them


@dataclass(frozen=True)
class Attempt:
    """What one process's part of a sum came to: `at_once` is what it asks for, less where memory ran out."""

    total: float
    at_once: int
    too_large: RenderedExample | None = None


def summed(
    computation: Computation,
    devices: Devices,
    indices: Sequence[int],
    rows: Sequence[RenderedExample],
    compute: Callable[[list[int]], float],
    shrunk: Callable[[int, int], None],
    *,
    trained: bool,
) -> float:
    """The sum of `compute` over the micro-batches of those rows, of which each process computes its share.

    When memory runs out in one of them, all compute all of it anew in parts of half the size, after `shrunk(before, after)`,
    which must undo what `compute` has done. Raises `JobFailed` with code `oom`, in all, for a row that does not fit alone.
    """
    own = devices.share(indices, rows)
    while True:
        attempts = devices.gather(attempted(computation, own, rows, compute, trained=trained))
        for attempt in attempts:
            if attempt.too_large is not None:
                raise alone_too_large(attempt.too_large)
        before, after = computation.at_once, min(attempt.at_once for attempt in attempts)
        if after == before:
            return sum(attempt.total for attempt in attempts)
        computation.limit(after)
        shrunk(before, after)
        release_heap()


def attempted(
    computation: Computation,
    indices: Sequence[int],
    rows: Sequence[RenderedExample],
    compute: Callable[[list[int]], float],
    *,
    trained: bool,
) -> Attempt:
    batches = computation.micro_batches(indices, rows, trained=trained)
    total, failed = 0.0, None
    for batch in batches:
        try:
            total += compute(batch)
        except Exception as error:
            if not ran_out_of_memory(error):
                raise
            failed = batch
            break
    if failed is None:
        return Attempt(total, computation.at_once)
    gc.collect()  # the error is gone by here, and with it the tensors that its traceback held
    sizes = sizes_of_several(computation, batches, rows)
    if not sizes or (len(failed) == 1 and computation.size(failed, rows) >= max(sizes)):
        return Attempt(total, computation.at_once, too_large=rows[failed[0]])
    return Attempt(total, half(computation, max(sizes)))


def shrink_after_kill(
    computation: Computation,
    devices: Devices,
    plan: StepPlan,
    step: int,
    train: Sequence[RenderedExample],
    validation: Sequence[RenderedExample],
) -> tuple[int, int] | None:
    """Halve the largest micro-batch, of any process, of the validation and of the next steps.

    Returns what is computed at once before and after; None where each row is computed alone.
    """
    sizes: list[int] = []
    for share in devices.shares(range(len(validation)), validation):
        sizes += sizes_of_several(computation, computation.micro_batches(share, validation, trained=False), validation)
    for coming in range(step, min(step + STEPS_LOOKED_AT, plan.total_steps)):
        for share in devices.shares(plan.row_indices(coming), train):
            sizes += sizes_of_several(computation, computation.micro_batches(share, train), train)
    if not sizes:
        return None
    before, after = computation.at_once, half(computation, max(sizes))
    computation.limit(after)
    return before, after


def sizes_of_several(
    computation: Computation, batches: Sequence[list[int]], rows: Sequence[RenderedExample]
) -> list[int]:
    """Sizes of the micro-batches that can be split."""
    return [computation.size(batch, rows) for batch in batches if len(batch) > 1]


def half(computation: Computation, largest: int) -> int:
    """Half of the largest micro-batch, in the computation's unit."""
    return max(1, min(computation.at_once, largest) // 2)


def alone_too_large(row: RenderedExample) -> JobFailed:
    return JobFailed(
        f"row {row.row} with {len(row.ids)} tokens does not fit into memory, though it is computed alone",
        code="oom",
        hint="--set training.gradient_checkpointing=true, --set training.memory=lean, a lower training.max_seq_length "
        "with training.too_long, fewer lora.target_modules; or more memory and lorasmith train --resume",
    )
