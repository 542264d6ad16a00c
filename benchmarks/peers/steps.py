"""What the peers' workers note of a step, and what the protocol asks to know of it. Needs torch and no other library."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import protocol
import torch


@dataclass
class StepRecord:
    """One optimizer step: its micro-batches, their losses (which add up to the step's mean) and its times."""

    batches: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def weigh_by_tokens(self, labelled: list[int]) -> None:
        """Where each loss is a mean over the labelled tokens of its micro-batch: their shares of the step's mean."""
        self.losses = [loss * count / sum(labelled) for loss, count in zip(self.losses, labelled, strict=True)]


class StepClock:
    """Times whole steps: from the end of the one before, so that fetching the batch counts too."""

    def __init__(self) -> None:
        self.load_seconds = 0.0
        self.records = [StepRecord()]
        self.mark = self.cpu_mark = 0.0

    def begin(self) -> None:
        self.load_seconds = protocol.load_seconds()
        self.mark, self.cpu_mark = time.perf_counter(), time.process_time()

    def end_step(self) -> None:
        now, cpu_now = time.perf_counter(), time.process_time()
        record = self.records[-1]
        record.seconds, record.cpu_seconds = now - self.mark, cpu_now - self.cpu_mark
        self.records.append(StepRecord())
        self.mark, self.cpu_mark = now, cpu_now


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
                "cpu_seconds": record.cpu_seconds,
                "loss": float(sum(loss.item() for loss in record.losses)),
            }
        )
    return reports
