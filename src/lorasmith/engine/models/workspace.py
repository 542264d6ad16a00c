"""Buffers that are allocated once and used by every step."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import torch
from torch import Tensor

from lorasmith.engine.models.device import CPU

MAPPED_BYTES = 1 << 17  # glibc's first threshold, before it grows


class Workspace:
    """Named buffers that grow and are kept: a step's tensors lie where the last step's lay.

    A buffer is overwritten by the next `take` of its name, so a name belongs to one tensor at a time.
    """

    mapping = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # of large buffers

    def __init__(self, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.dtype = dtype
        self.device = device
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised contiguous tensor of that shape, in the workspace's dtype unless another is given."""
        key, size = (name, dtype or self.dtype), math.prod(shape)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < size:
            self.buffers.pop(key, None)  # freed before the larger one is made
            buffer = self.buffers[key] = self.allocated(size, key[1])
        return buffer[:size].view(shape)

    def allocated(self, size: int, dtype: torch.dtype) -> Tensor:
        """Outside of the heap where it is large: a buffer that has grown leaves no hole of its old size."""
        size_bytes = size * dtype.itemsize
        if size_bytes < MAPPED_BYTES or self.device.type != "cpu":
            return torch.empty(size, dtype=dtype, device=self.device)
        return torch.frombuffer(mmap.mmap(-1, size_bytes, flags=self.mapping), dtype=dtype)

    def clear(self) -> None:
        self.buffers.clear()

    @property
    def size_bytes(self) -> int:
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers.values())


def retain_heap() -> None:
    """Let glibc keep memory that is freed from now on: a step that maps and unmaps gigabytes spends a fifth of its time in page faults."""
    mallopt = glibc("mallopt")
    if mallopt is None:
        return  # another C library; its allocator keeps what it likes
    trim_heap()
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)
    mallopt(top_pad, 64 << 20)


def release_heap() -> None:
    """Give freed memory back to the system, whatever `retain_heap` said, and that of a GPU's cache.

    Where `retain_heap` said nothing, tensors that find no place in the heap are mapped from now on. glibc maps those of up to
    32 MB only until it has freed one as large, and then keeps gigabytes of them below small things that outlive a step.
    """
    mallopt = glibc("mallopt")
    if mallopt is not None:
        mmap_threshold = -3
        mallopt(mmap_threshold, MAPPED_BYTES)
    trim_heap()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def trim_heap() -> None:
    """Give memory that was freed until now back to the system."""
    trim = glibc("malloc_trim")
    if trim is not None:
        trim(0)


def glibc(function: str) -> Any:
    try:
        return getattr(ctypes.CDLL("libc.so.6"), function)
    except (OSError, AttributeError):
        return None
