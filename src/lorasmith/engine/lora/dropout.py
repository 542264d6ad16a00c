"""Dropout whose mask is a function of seed, step and row alone, however rows are packed or split."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import copy
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lorasmith.engine.models.device import CPU


class Dropout(Protocol):
    def dropped(self, width: int, share: float) -> Tensor:
        """Flat indices into (T, width) of the next mask's zeros, each element with probability `share`."""
        ...

    def of(self, lengths: Sequence[int]) -> Dropout:
        """The same stream of masks, for only so many tokens of each row."""
        ...


class RowDropout:
    """One stream of random numbers per row; each layer of a forward pass takes its masks from them in turn."""

    def __init__(
        self, seed: int, step: int, rows: Sequence[int], lengths: Sequence[int], device: torch.device = CPU
    ) -> None:
        """`rows` name the packed rows, `lengths` are their tokens. Masks are drawn on the CPU, the same for each device."""
        self.streams = [np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, step, row)))) for row in rows]
        self.lengths = lengths
        self.device = device

    def of(self, lengths: Sequence[int]) -> Dropout:
        part = copy(self)  # of the object: the streams are one
        part.lengths = lengths
        return part

    def dropped(self, width: int, share: float) -> Tensor:
        found, start = [], 0
        for stream, length in zip(self.streams, self.lengths, strict=True):
            found.append(bernoulli_positions(stream, length * width, share) + start)
            start += length * width
        return torch.from_numpy(np.concatenate(found)).to(self.device)


class RecordedDropout:
    """Keeps the masks that it hands out, so that a layer computed again gets the same."""

    def __init__(self, source: Dropout, masks: list[Tensor] | None = None) -> None:
        self.source = source
        self.masks: list[Tensor] = [] if masks is None else masks

    def of(self, lengths: Sequence[int]) -> Dropout:
        return RecordedDropout(self.source.of(lengths), self.masks)

    def dropped(self, width: int, share: float) -> Tensor:
        self.masks.append(self.source.dropped(width, share))
        return self.masks[-1]

    def replay(self) -> Dropout:
        return ReplayedDropout(iter(self.masks))


class ReplayedDropout:
    def __init__(self, masks: Iterator[Tensor]) -> None:
        self.masks = masks

    def of(self, lengths: Sequence[int]) -> Dropout:
        return self

    def dropped(self, width: int, share: float) -> Tensor:
        return next(self.masks)


def bernoulli_positions(
    stream: np.random.Generator, size: int, share: float
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Which of `size` independent trials succeed, ascending.

    The gaps between successes are geometric, floor(E / -log(1 - share)) with E exponential, so only the successes cost.
    """
    rate = -math.log1p(-share)
    expected = size * share
    chunk = int(expected + 6 * math.sqrt(expected) + 16)
    parts: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    last = -1
    while last < size:
        gaps = (stream.standard_exponential(chunk) / rate).astype(np.int64) + 1
        parts.append(last + np.cumsum(gaps))
        last = int(parts[-1][-1])
    positions = np.concatenate(parts)
    return positions[: np.searchsorted(positions, size)]
