"""A computation that runs out of memory at a size of one's choice, with what torch raises there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.training.computation import Computation


class SmallMemory:
    """A computation on a machine that has room for `room` at once: more raise what torch raises there."""

    def __init__(self, computation: Computation, room: int) -> None:
        self.computation, self.room = computation, room

    def __getattr__(self, name: str) -> Any:
        return getattr(self.computation, name)

    def gradients(self, indices: Sequence[int], rows: Sequence[RenderedExample], *, scale: float, step: int) -> float:
        nats = self.computation.gradients(
            indices, rows, scale=scale, step=step
        )  # a failure leaves half a gradient behind
        if self.computation.size(indices, rows) > self.room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory")
        return nats
