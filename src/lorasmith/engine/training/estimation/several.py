"""Seconds of several processes at a time: of the slowest, of what they exchange, and of one process in their place."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.training.checkpoints import trainable
from lorasmith.engine.training.computation import Computation
from lorasmith.engine.training.devices import Devices, buckets
from lorasmith.engine.training.estimation.sample import Sample, most_tokens, tokens_of
from lorasmith.engine.training.estimation.shape import RunShape
from lorasmith.engine.training.memory import Attempt

REPEATS = 5


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def slowest(devices: Devices, work: Callable[[], object]) -> float:
    """Seconds of the process that takes longest, when all begin at once."""
    devices.gather(None)
    return max(devices.gather(seconds(work)))


def exchange_seconds(devices: Devices) -> float:
    """Of a step: its losses, and whether to save or to stop."""

    def exchange() -> None:
        devices.gather(Attempt(0.0, 0))
        devices.agree((False, False))

    return statistics.median(slowest(devices, exchange) for _ in range(REPEATS))


def reduce_seconds(shape: RunShape, devices: Devices) -> float:
    """Per trained element, of summing as many gradients of the run as are summed at once."""
    summed = next(buckets(trainable(shape.model).values()))
    parameters = [nn.Parameter(torch.zeros(parameter.shape)) for parameter in summed]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    repeats = [slowest(devices, lambda: devices.sum_gradients(parameters)) for _ in range(REPEATS)]
    return statistics.median(repeats) / sum(parameter.numel() for parameter in parameters)


def alone_share(
    computation: Computation,
    sample: Sample,
    rows: Sequence[RenderedExample],
    devices: Devices,
    threads_alone: int,
) -> float:
    """Seconds of a token in one process with all cores, as a share of those in the slowest of all processes."""
    of_each = sample.batches[0]

    def gradients(batch: list[int]) -> object:
        return batch and computation.gradients(batch, rows, scale=1e-3, step=0)

    def alone() -> float:
        with threads(threads_alone):
            gradients(sample.alone)  # compiles what this many threads need
            return min(seconds(lambda: gradients(sample.alone)) for _ in range(2)) / tokens_of(sample.alone, rows)

    together = min(slowest(devices, lambda: gradients(of_each[devices.rank])) for _ in range(2))
    return devices.found_by_first(alone) / (together / most_tokens(of_each, rows))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
