"""What the orchestrator says to a worker, and what a worker answers.

A worker is a script that only trains: `python NAME_worker.py '{settings as JSON}'`, one process, one run, its own
environment. The last line of its stdout is one JSON object (`answer`); what its libraries print later goes to stderr, and
a failure is a traceback there with a non-zero exit status. It imports nothing of the benchmark but this module.

Settings; those marked "peers" or "ours" are absent for the others:

    model                   folder: config.json, tokenizer, random weights as bf16 safetensors
    adapter                 folder: PEFT adapter, float32, A random, B zero, dropout 0: every worker starts from it
    rows                    JSON lines file: {"input_ids": [int], "completion_mask": [0 or 1]}, one row a line; ids are
                            trained as they stand (no template, no EOS added, nothing cut)
    rows_per_step           rows of one optimizer step (4)
    steps                   which steps to train, in this order, e.g. [0, 2]: with "fixed" batching step k holds the rows
                            rows_per_step * k and up; else the k-th step in the library's own order. The weights
                            after one step are the start of the next. The reader leaves the first out of its times.
    precision               "default" (the library decides), "fp32", "bf16" (autocast over float32 weights; for ours:
                            bf16 weights and products), "bf16-weights" (peers: frozen weights in bf16, autocast; where
                            the library has one dtype for everything, LoRA in bf16 too: `resolved` says so),
                            "auto" (ours: bf16 where the CPU multiplies it natively, else fp32)
    threads                 int, or null: the library's own default
    batching                "fixed" (rows in file order, padded), "flat" (in file order, laid end to end without padding),
                            "grouped" (by length), "packed". Ours gets "fixed" and may lay rows out as it likes.
    micro_batch_rows        peers: rows of one forward pass; gradients accumulate up to rows_per_step. null: all of the
                            step's rows. Ours forms its micro-batches itself.
    packed_tokens           "packed" only: tokens of one packed sequence; one sequence is one optimizer step
    gradient_checkpointing  peers: true, false, or null (the library decides)
    compile                 peers: torch.compile, as the library offers it
    dropout                 LoRA dropout, 0.0 or 0.05
    learning_rate           2e-4; constant, no warm-up, AdamW (0.9, 0.999, 1e-8), weight decay 0, no clipping, float32 LoRA
    seed                    int, for the dropout masks
    memory                  ours only: "fast" (packed copies of the weights) or "lean" (as they are in the file)
    micro_batch_tokens      ours only: tokens that are computed at once

Answer:

    library        "lorasmith", or a peer as runner.py names it
    versions       {"torch": "2.13.0+cpu", ...}
    resolved       what the library decided, for the reader's eyes: {"threads": 2, "bf16": false, ...}
    steps          one object per trained step, in order: {"rows": [row numbers in the file], "tokens": unpadded tokens,
                   "labelled_tokens": tokens with completion_mask 1, "padded_tokens": tokens that went through the
                   layers (= tokens without padding), "seconds": whole optimizer step, "cpu_seconds": of all
                   threads, what can still be read where others use the machine, "loss": mean cross-entropy in nats
                   over the labelled tokens of the step, before its update, unrounded}
    load_seconds   start of the process until just before the first step
    peak_bytes     `ru_maxrss` of the process, in bytes, read after the last step
    precision      ours only: "fp32" or "bf16", what "auto" became
    paths          ours only: {name of a path: how many modules took it}, of those with a LoRA and the head; a name that
                   starts with "peft" means that they fell back to PEFT
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

STARTED = time.perf_counter()
Settings = dict[str, Any]


def begin() -> tuple[Settings, TextIO]:
    """The settings of argument 1, and the stream for `answer`: stdout itself goes to stderr from here on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return json.loads(sys.argv[1]), answers


def read_rows(settings: Settings) -> list[dict[str, list[int]]]:
    """All rows of the file, in order."""
    return [json.loads(line) for line in Path(settings["rows"]).read_text(encoding="utf-8").splitlines()]


def load_seconds() -> float:
    """Seconds since this module was imported, which a worker does first."""
    return time.perf_counter() - STARTED


def peak_bytes() -> int:
    """Peak resident memory of this process: Linux counts ru_maxrss in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class RowFinder:
    """Which rows of the file a batch holds, however the library has ordered, padded or packed them."""

    KEY_LENGTH = 4  # random ids: four in a row do not repeat within a few thousand tokens

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.row_of_start = {tuple(row["input_ids"][: self.KEY_LENGTH]): i for i, row in enumerate(rows)}
        if len(self.row_of_start) != len(rows):
            raise ValueError(f"two of the {len(rows)} rows start with the same {self.KEY_LENGTH} ids")

    def rows_in(self, sequences: Iterable[list[int]]) -> list[int]:
        """Row numbers in the order in which their starts appear in the token id sequences."""
        found = []
        for ids in sequences:
            for start in range(len(ids) - self.KEY_LENGTH + 1):
                row = self.row_of_start.get(tuple(ids[start : start + self.KEY_LENGTH]))
                if row is not None:
                    found.append(row)
        return found


def answer(answers: TextIO, value: dict[str, Any]) -> None:
    """Print the one line that the orchestrator reads."""
    answers.write(json.dumps(value) + "\n")
    answers.flush()
