"""What a step to be rehearsed has: dropout masks and quantised weights as large as in a run, and nobody draws or reads them.

Drawn and read, those of a model that does not fit into memory would not fit either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.lora.dropout import Dropout
from lorasmith.engine.lora.quantized import (
    AS_STORED,
    BLOCK,
    CHUNK,
    MAGNITUDE_BLOCK,
    AsStored,
    Kind,
    Quantization,
    QuantizedWeight,
)
from lorasmith.engine.models.packing import pack
from lorasmith.engine.training.computation import PackedComputation

DRAWING_COPIES = 3  # `bernoulli_positions` holds so many arrays of the mask's size beside it


class UntouchedDropout:
    """Masks of the expected size, whose memory is only allocated."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.tokens = sum(lengths)

    def dropped(self, width: int, share: float) -> Tensor:
        zeros = round(self.tokens * width * share)
        drawing = [torch.empty(zeros, dtype=torch.int64) for _ in range(DRAWING_COPIES)]
        mask = torch.empty(zeros, dtype=torch.int64)
        drawing.clear()
        return mask

    def of(self, lengths: Sequence[int]) -> Dropout:
        return UntouchedDropout(lengths)


@dataclass(frozen=True)
class UntouchedWeight:
    """A quantised matrix (out, in) by its size: dequantising it takes room on top as in a run, and computes nothing."""

    shape: tuple[int, int]
    quantization: Quantization

    @property
    def kind(self) -> Kind:
        return self.quantization.kind

    @property
    def blocks(self) -> int:
        return -(-prod(self.shape) // BLOCK)

    @property
    def nbytes(self) -> int:
        """Codes, and fp32 scales: of rows, of blocks, or of blocks of those."""
        if self.kind == "int8":
            return prod(self.shape) + 4 * self.shape[0]
        if not self.quantization.double:
            return BLOCK // 2 * self.blocks + 4 * self.blocks
        return BLOCK // 2 * self.blocks + self.blocks + 4 * -(-self.blocks // MAGNITUDE_BLOCK) + 4  # and their mean

    def dequantize(self, out: Tensor) -> Tensor:
        """Each tensor lives as long as that of `Blocks.dequantize`: what stays too long leaves other holes in the heap."""
        if self.kind == "int8":
            return out
        flat = out if prod(self.shape) % BLOCK == 0 else out.new_empty(BLOCK * self.blocks)
        magnitudes = self.magnitudes()
        indices = torch.empty(min(CHUNK, BLOCK // 2 * self.blocks), dtype=torch.int32)
        room = None if flat.dtype == torch.float32 else torch.empty(2 * len(indices))
        del magnitudes, room
        return out

    def magnitudes(self) -> Tensor | None:
        """(blocks,), where they are not stored as they are."""
        if not self.quantization.double:
            return None
        codes = torch.empty(self.blocks, dtype=torch.int32)
        coarse = torch.empty(len(codes))
        del codes
        torch.empty(MAGNITUDE_BLOCK * -(-self.blocks // MAGNITUDE_BLOCK))  # their scales, repeated
        return coarse


def untouched_weight(shape: tuple[int, int], quantization: Quantization) -> QuantizedWeight:
    """What is held as it is stored has values, though none that could be read: products in int16 multiply them."""
    if quantization == AS_STORED:
        return AsStored(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    return UntouchedWeight(shape, quantization)


class UntouchedComputation(PackedComputation):
    """`PackedComputation` without a cache, with masks that are not drawn."""

    def gradients(self, indices: Sequence[int], rows: Sequence[RenderedExample], *, scale: float, step: int) -> float:
        packed = pack([rows[index] for index in indices], share=self.decoder.decoder.may_share)
        return self.decoder.gradients(packed, scale, UntouchedDropout(packed.lengths))
