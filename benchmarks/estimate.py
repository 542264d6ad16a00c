"""What `lorasmith estimate` says against what the run then takes: peak memory (ru_maxrss of each process) and time, start to end.

python benchmarks/estimate.py [--runs NAME ...] [--measure-s S] [--repeats N]: JSON lines, closing lines per run, exit 1 when short.

Each run is estimated and then done, at least ten times as long as the measuring: its steps are chosen from a first estimate.
Memory has to be within 10 %, time within the larger of 15 % and twice the machine's own spread: what repeats of one
micro-batch differ by while the estimate measures, and, with --repeats above 1, what repeats of the run differ by.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import workload
from report import Bar, close, emit
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lorasmith.schemas.estimation import Estimate
from lorasmith.services.estimation import estimate
from lorasmith.services.training import build_spec, start_training, train
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from lorasmith.starter.location import starter_model

BENCHMARK = "estimate"
MEMORY_BAR, TIME_BAR = 0.10, 0.15
TIMES_LONGER = 10


@dataclass(frozen=True)
class Run:
    """A model (`starter`, or a shape with random weights) and how it differs from the preset."""

    model: str
    preset: str
    settings: list[str] = field(default_factory=list)


RUNS = {
    "starter, rank 8, batches of 8, lean": Run("starter", "quick", ["training.memory=lean", "lora.target_modules=all"]),
    "starter, rank 64, packed": Run(
        "starter", "tiny", ["training.precision=fp32", "training.memory=fast", "lora.rank=64", "lora.dropout=0.05"]
    ),
    "smollm2-135m, lean": Run("smollm2-135m", "cpu", ["training.memory=lean", "lora.rank=16"]),
    "smollm2-135m, gradient checkpointing": Run(
        "smollm2-135m", "balanced", ["training.memory=lean", "training.gradient_checkpointing=true"]
    ),
    "smollm2-135m, two processes": Run(
        "smollm2-135m", "cpu", ["training.memory=lean", "lora.rank=16", "training.processes=2"]
    ),
}


def model_folder(shape: str, home: Path) -> str:
    """`starter`, or a folder with random weights of that shape and the starter's tokenizer."""
    if shape == "starter":
        return shape
    folder = home / shape
    if not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(starter_model())
        torch.manual_seed(0)
        config = AutoConfig.for_model(**workload.SHAPES[shape], eos_token_id=tokenizer.eos_token_id)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return str(folder)


def estimated(home: Workbench, run: Run, measure_s: float, steps: int) -> tuple[Any, Estimate]:
    flags = {"model": model_folder(run.model, home.home), "data": "signatures", "preset": run.preset}
    assignments = [*run.settings, "training.num_epochs=1000", f"training.max_steps={steps}"]
    spec = build_spec(flags, assignments=assignments)
    return spec, estimate(home, spec, lambda event: None, measuring_s=measure_s)


def really(home: Workbench, spec: Any) -> tuple[float, int, float]:
    """Seconds from the start of the engine to its end, the peak bytes of its processes, and seconds of training alone."""
    job = start_training(home, spec)
    began = time.perf_counter()
    train(home, job, lambda event: None)
    seconds = time.perf_counter() - began
    result = json.loads((home.path(job.folder) / "result.json").read_text())
    return seconds, result["peak_memory_bytes"], result["training_time_seconds"]


def measure(name: str, run: Run, home: Workbench, measure_s: float, repeats: int) -> list[Bar]:
    _, first = estimated(home, run, measure_s, 100)
    assert first.time is not None
    wanted = 1.1 * TIMES_LONGER * first.time.measured_s
    spec, said = estimated(home, run, measure_s, max(20, math.ceil(100 * wanted / first.time.training_s)))
    assert said.time is not None
    emit(BENCHMARK, run=name, load=os.getloadavg()[0], estimate=said.model_dump(exclude={"suggestions"}))
    seconds, peaks = [], []
    for repeat in range(repeats):
        load = os.getloadavg()[0]
        wall, peak, training = really(home, spec)
        emit(
            BENCHMARK, run=name, repeat=repeat, load=load, seconds=wall, training_s=training, peak_bytes=peak,
            times_the_measuring=training / said.time.measured_s,
        )  # fmt: skip
        seconds.append(wall)
        peaks.append(peak)
    wall, peak = statistics.median(seconds), statistics.median(peaks)
    spread = max(said.time.spread, (max(seconds) - min(seconds)) / min(seconds))
    bar = max(TIME_BAR, 2 * spread)
    return [
        Bar(
            f"memory, {name}",
            f"{said.memory.peak_bytes / 1e6:.0f} MB",
            f"{peak / 1e6:.0f} MB (the run)",
            abs(said.memory.peak_bytes / peak - 1),
            MEMORY_BAR,
            at_least=False,
        ),
        Bar(
            f"time, {name}",
            f"{said.time.total_s:.0f} s",
            f"{wall:.0f} s (the run; spread {spread:.0%})",
            abs(said.time.total_s / wall - 1),
            round(bar, 2),
            at_least=False,
        ),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=RUNS)
    parser.add_argument("--measure-s", type=float, default=20.0)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        home = Workbench.open(Settings(home=Path(folder)))
        for name in options.runs:
            bars += measure(name, RUNS[name], home, options.measure_s, options.repeats)
    return close(bars)


if __name__ == "__main__":
    sys.exit(main())
