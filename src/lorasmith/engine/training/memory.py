"""Micro-batches that fit into memory: where it runs out, the same sum is computed in smaller parts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.models.workspace import release_heap
from lorasmith.engine.out_of_memory import ran_out_of_memory
from lorasmith.engine.training.batches import StepPlan
from lorasmith.engine.training.computation import Computation
from lorasmith.errors import JobFailed

STEPS_LOOKED_AT = 64  # for the largest micro-batch; finding the rows of a step costs a shuffle of all of them


def summed(
    computation: Computation,
    indices: Sequence[int],
    rows: Sequence[RenderedExample],
    compute: Callable[[list[int]], float],
    shrunk: Callable[[int, int], None],
    *,
    trained: bool,
) -> float:
    """The sum of `compute` over the micro-batches of those rows.

    When memory runs out, all of it is computed anew in parts of half the size, after `shrunk(before, after)`, which must
    undo what `compute` has done. Raises `JobFailed` with code `oom` for a row that does not fit alone.
    """
    while True:
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
            return total
        gc.collect()  # the error is gone by here, and with it the tensors that its traceback held
        sizes = sizes_of_several(computation, batches, rows)
        if not sizes or (len(failed) == 1 and computation.size(failed, rows) >= max(sizes)):
            raise alone_too_large(rows[failed[0]])
        shrunk(*halve(computation, max(sizes)))
        release_heap()


def shrink_after_kill(
    computation: Computation,
    plan: StepPlan,
    step: int,
    train: Sequence[RenderedExample],
    validation: Sequence[RenderedExample],
) -> tuple[int, int] | None:
    """Halve the largest micro-batch of the validation and of the next steps; None where each row is computed alone."""
    sizes = sizes_of_several(
        computation, computation.micro_batches(range(len(validation)), validation, trained=False), validation
    )
    for coming in range(step, min(step + STEPS_LOOKED_AT, plan.total_steps)):
        sizes += sizes_of_several(computation, computation.micro_batches(plan.row_indices(coming), train), train)
    return halve(computation, max(sizes)) if sizes else None


def sizes_of_several(
    computation: Computation, batches: Sequence[list[int]], rows: Sequence[RenderedExample]
) -> list[int]:
    """Sizes of the micro-batches that can be split."""
    return [computation.size(batch, rows) for batch in batches if len(batch) > 1]


def halve(computation: Computation, largest: int) -> tuple[int, int]:
    """Compute at most half of the largest micro-batch at once; returns the bound before and after."""
    before = computation.at_once
    computation.limit(max(1, min(before, largest) // 2))
    return before, computation.at_once


def alone_too_large(row: RenderedExample) -> JobFailed:
    return JobFailed(
        f"row {row.row} with {len(row.ids)} tokens does not fit into memory, though it is computed alone",
        code="oom",
        hint="--set training.gradient_checkpointing=true, --set training.memory=lean, a lower training.max_seq_length "
        "with training.too_long, fewer lora.target_modules; or more memory and lorasmith train --resume",
    )
