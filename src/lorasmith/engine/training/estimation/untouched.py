"""A packed step to be rehearsed: its dropout masks are as large as in a run, and nobody draws them.

Drawn, the masks of a model that does not fit into memory would not fit either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.lora.dropout import Dropout
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


class UntouchedComputation(PackedComputation):
    """`PackedComputation` without a cache, with masks that are not drawn."""

    def gradients(self, indices: Sequence[int], rows: Sequence[RenderedExample], *, scale: float, step: int) -> float:
        packed = pack([rows[index] for index in indices], share=self.decoder.decoder.may_share)
        return self.decoder.gradients(packed, scale, UntouchedDropout(packed.lengths))
