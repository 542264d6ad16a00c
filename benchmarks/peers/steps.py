"""What the peers' workers note of a step, and what the protocol asks to know of it. Needs torch and no other library."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import protocol
import torch


@dataclass
class StepRecord:
    """One optimizer step: its micro-batches, their losses (which add up to the step's mean) and its time."""

    batches: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0


class StepClock:
    """Times whole steps: from the end of the one before, so that fetching the batch counts too."""

    def __init__(self) -> None:
        self.load_seconds = 0.0
        self.records = [StepRecord()]
        self.mark = 0.0

    def begin(self) -> None:
        self.load_seconds = protocol.load_seconds()
        self.mark = time.perf_counter()

    def end_step(self) -> None:
        now = time.perf_counter()
        self.records[-1].seconds = now - self.mark
        self.records.append(StepRecord())
        self.mark = now


def step_reports(clock: StepClock, rows: list[dict[str, list[int]]]) -> list[dict[str, Any]]:
    """The answer's `steps`."""
    finder = protocol.RowFinder(rows)
    reports = []
    for record in clock.records[:-1]:
        found = [row for batch in record.batches for row in finder.rows_in(batch.tolist())]
        reports.append(
            {
                "rows": found,
                "tokens": sum(len(rows[row]["input_ids"]) for row in found),
                "labelled_tokens": sum(sum(rows[row]["completion_mask"]) for row in found),
                "padded_tokens": sum(batch.numel() for batch in record.batches),
                "seconds": record.seconds,
                "loss": float(sum(loss.item() for loss in record.losses)),
            }
        )
    return reports
