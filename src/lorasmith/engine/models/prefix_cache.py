"""What frozen layers below the first adapter compute: the same in every epoch, so it is kept on disk and read again."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from lorasmith.errors import DiskFull
from lorasmith.files import disk_errors

STREAMS, CHECKSUMS = "streams.bin", "checksums.bin"


class PrefixCache:
    """Residual streams (tokens, H) of rows, memory-mapped, at most `limit_bytes` of them, whose disk space is reserved.

    A row's checksum is written behind its stream: one that a crash left half-written is computed again.
    """

    def __init__(self, folder: Path, lengths: Sequence[int], hidden: int, dtype: torch.dtype, limit_bytes: int) -> None:
        row_bytes = [length * hidden * dtype.itemsize for length in lengths]
        ends = [end for end in accumulate(row_bytes) if end <= limit_bytes]
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self.hidden = hidden
        self.dtype = dtype
        self.ends = [0, *ends]
        try:
            self.streams = mapped(folder / STREAMS, max(1, self.ends[-1]), torch.uint8)
            self.checksums = mapped(folder / CHECKSUMS, max(1, len(ends)), torch.int64)
        except DiskFull:
            if new:
                shutil.rmtree(folder)
            raise
        self.verified: set[int] = set()

    def keeps(self, row: int) -> bool:
        """Whether there is room for that row."""
        return row + 1 < len(self.ends)

    def bytes_of(self, row: int) -> Tensor:
        return self.streams[self.ends[row] : self.ends[row + 1]]

    def read(self, row: int) -> Tensor | None:
        """The row's stream (tokens, H), or None where it has not been computed yet."""
        if not self.keeps(row) or not self.checksums[row]:
            return None
        if row not in self.verified:
            if checksum(self.bytes_of(row)) != int(self.checksums[row]):
                return None
            self.verified.add(row)
        return self.bytes_of(row).view(self.dtype).view(-1, self.hidden)

    def write(self, row: int, stream: Tensor) -> None:
        if self.keeps(row) and row not in self.verified:
            self.bytes_of(row).copy_(stream.contiguous().view(-1).view(torch.uint8))
            self.checksums[row] = checksum(self.bytes_of(row))
            self.verified.add(row)


def mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    """A file as a tensor of `size` elements, zeros where it is new. Raises `DiskFull` when they have no room.

    Without the reservation, a disk that fills up later would end the process at a write into the map (SIGBUS).
    """
    size_bytes = size * dtype.itemsize
    try:
        with disk_errors(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.posix_fallocate(handle, 0, size_bytes)
            finally:
                os.close(handle)
    except DiskFull as error:
        raise DiskFull(
            f"{error.message}; what the frozen layers compute takes {size_bytes / 1e6:,.1f} MB there",
            hint="a lower --set training.prefix_cache_gb (0 computes it in every epoch), or free some space",
            needed_bytes=size_bytes,
        ) from error
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)


def checksum(data: Tensor) -> int:
    """CRC-32 with a bit above it, so that it is never the zero of an empty place."""
    return zlib.crc32(data.numpy().data) | 1 << 32
