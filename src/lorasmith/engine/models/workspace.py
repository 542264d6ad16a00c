"""Buffers that are allocated once and used by every step."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor


class Workspace:
    """Named buffers that grow and are never freed: a step's tensors lie where the last step's lay.

    A buffer is overwritten by the next `take` of its name, so a name belongs to one tensor at a time.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised contiguous tensor of that shape, in the workspace's dtype unless another is given."""
        key, size = (name, dtype or self.dtype), math.prod(shape)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            self.buffers.pop(key, None)  # freed before the larger one is made
            buffer = self.buffers[key] = torch.empty(size, dtype=key[1])
        return buffer[:size].view(shape)

    @property
    def size_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())


def retain_heap() -> None:
    """Let glibc keep freed memory: a step that maps and unmaps gigabytes spends a fifth of its time in page faults."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return  # another C library; its allocator keeps what it likes
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)
    mallopt(top_pad, 64 << 20)
