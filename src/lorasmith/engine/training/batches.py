"""Which rows make which optimizer step: a pure function of seed and step, so that a resumed run sees the same."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.engine.data.rendering import RenderedExample

IGNORED = -100
LENGTH_STEP = 16  # tokens; oneDNN compiles and keeps a kernel for each new matrix shape, so few shapes are faster


@dataclass(frozen=True)
class StepPlan:
    """Rows per optimizer step and the number of steps; the last step of an epoch may be smaller."""

    rows: int
    step_rows: int
    total_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.rows / self.step_rows)

    def row_indices(self, step: int) -> list[int]:
        """Rows of optimizer step `step`, counted from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        order = list(range(self.rows))
        random.Random(f"{self.seed}:{epoch}").shuffle(order)
        return order[within * self.step_rows : (within + 1) * self.step_rows]


def plan_steps(
    rows: int, *, batch_size: int, accumulation: int, epochs: float, max_steps: int | None, seed: int
) -> StepPlan:
    step_rows = min(batch_size * accumulation, rows)
    total = max(1, round(epochs * math.ceil(rows / step_rows)))
    return StepPlan(rows, step_rows, min(total, max_steps) if max_steps else total, seed)


def pad_batch(rows: list[RenderedExample], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and labels (B, T), padded on the right; labels are IGNORED off the trained tokens.

    Padding is known by length, never by token id, so a pad token equal to the stop token keeps its label. On the
    right of a causal model it changes nothing to its left and needs no attention mask.
    """
    longest = -(-max(len(row.ids) for row in rows) // LENGTH_STEP) * LENGTH_STEP
    ids = torch.full((len(rows), longest), pad_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for index, row in enumerate(rows):
        tokens = torch.tensor(row.ids)
        ids[index, : len(tokens)] = tokens
        labels[index, : len(tokens)] = torch.where(torch.tensor(row.trained), tokens, IGNORED)
    return ids, labels
