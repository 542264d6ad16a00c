"""An ordered map over processes that holds a bounded number of inputs and results."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from lorasmith.errors import Killed

Given = TypeVar("Given")
Made = TypeVar("Made")

TASKS_BEFORE_PROCESSES = 24  # of the work of a chunk of rows, some 70 ms; starting processes costs half a second
WAITING_PER_PROCESS = 3


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


class Workers:
    """Runs functions in up to `processes` processes, which start when there is enough work for them.

    The processes are spawned: forking one that has threads can lock it up. What they run and receive is pickled.
    """

    def __init__(self, processes: int | None = None) -> None:
        self.processes = usable_cores() if processes is None else processes
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def started(self) -> ProcessPoolExecutor:
        if self.pool is None:
            self.pool = ProcessPoolExecutor(self.processes, multiprocessing.get_context("spawn"))
        return self.pool

    def map(self, function: Callable[[Given], Made], inputs: Iterable[Given]) -> Iterator[Made]:
        """Results in the order of the inputs, whatever the number of processes. Raises `Killed` when one of them dies."""
        source = iter(inputs)
        if self.processes == 1:
            yield from map(function, source)
            return
        few = [item for _, item in zip(range(TASKS_BEFORE_PROCESSES), source, strict=False)]
        if self.pool is None and len(few) < TASKS_BEFORE_PROCESSES:
            yield from map(function, few)
            return
        try:
            yield from self.map_in_pool(function, few, source)
        except BrokenProcessPool:
            raise Killed(
                f"the system killed one of the {self.processes} processes that hash and compare rows, most often because "
                "memory ran out; nothing was stored",
                hint="free some memory, or use one process, which takes less: taskset --cpu-list 0 lorasmith …",
            ) from None

    def map_in_pool(
        self, function: Callable[[Given], Made], few: list[Given], source: Iterator[Given]
    ) -> Iterator[Made]:
        pool = self.started()
        waiting: deque[Future[Made]] = deque(pool.submit(function, item) for item in few)
        for item in source:
            if len(waiting) >= WAITING_PER_PROCESS * self.processes:
                yield waiting.popleft().result()
            waiting.append(pool.submit(function, item))
        while waiting:
            yield waiting.popleft().result()
