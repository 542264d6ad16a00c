"""`MemoryOptimizer`: watch what code takes, and ask what would make a run fit into a target. Importing this loads no torch."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from lorasmith.errors import InvalidSpec
from lorasmith.schemas.estimation import MEASURING_S, Estimate
from lorasmith.services.estimation import estimate
from lorasmith.services.training import build_spec
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings

SAMPLE_EVERY_S = 0.05
LEAK_REPEATS = 3  # blocks of one name, each of which ends with more than the one before
LEAK_SHARE = 0.01  # more, of what the process had


@dataclass
class MemoryReading:
    """What a watched block took: bytes of this process in memory, and of the GPU where torch uses one."""

    name: str
    start_bytes: int
    peak_bytes: int
    end_bytes: int
    gpu_peak_bytes: int = 0

    @property
    def most_bytes(self) -> int:
        """On the device that computes: the GPU where one was used, else the process."""
        return self.gpu_peak_bytes or self.peak_bytes


class MemoryOptimizer:
    """Keep a run within `target_gpu_memory_gb` (1e9 bytes) of the device that computes it. Suggestions are for runs on a CPU.

    `model` and `data`, and settings as `lorasmith train --set` takes them, name the run that suggestions are for.
    """

    def __init__(
        self,
        target_gpu_memory_gb: float = 7.5,
        *,
        model: str | None = None,
        data: str | None = None,
        preset: str | None = None,
        settings: list[str] | None = None,
        home: Path | str | None = None,
    ) -> None:
        if target_gpu_memory_gb <= 0:
            raise InvalidSpec(f"target_gpu_memory_gb must be above 0, got {target_gpu_memory_gb}")
        if (model is None) != (data is None):
            raise InvalidSpec("give model and data, which are the run that suggestions are for, or none of both")
        self.target_bytes = round(target_gpu_memory_gb * 1e9)
        self.flags = {"model": model, "data": data, "preset": preset}
        self.settings = settings or []
        self.home = Path(home) if home else None
        self.readings: list[MemoryReading] = []

    @contextmanager
    def memory_monitor(self, name: str) -> Iterator[MemoryReading]:
        """Watch the block; what is yielded is filled in while it runs, and kept in `readings`."""
        process = psutil.Process()
        now = process.memory_info().rss
        reading = MemoryReading(name, now, now, now)
        self.readings.append(reading)
        reset_gpu_peak()
        done = threading.Event()

        def watch() -> None:
            while not done.wait(SAMPLE_EVERY_S):
                reading.peak_bytes = max(reading.peak_bytes, process.memory_info().rss)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield reading
        finally:
            done.set()
            watcher.join()
            reading.end_bytes = process.memory_info().rss
            reading.peak_bytes = max(reading.peak_bytes, reading.end_bytes)
            reading.gpu_peak_bytes = gpu_peak_bytes()

    def estimate(self, measuring_s: float = MEASURING_S) -> Estimate:
        """What `lorasmith estimate` says of the run. Raises `InvalidSpec` where no run was named."""
        if self.flags["model"] is None:
            raise InvalidSpec("no run to estimate", hint="MemoryOptimizer(7.5, model='starter', data='signatures')")
        workbench = Workbench.open(Settings.read(self.home))
        spec = build_spec(self.flags, assignments=self.settings, home=workbench.home)
        return estimate(workbench, spec, lambda event: None, measuring_s=measuring_s)

    def suggest_optimizations(self) -> list[str]:
        """Sentences: what was watched against the target, blocks that keep memory, and changes of the run with their effect."""
        return [*map(self.verdict, self.readings), *self.leaks(), *self.changes()]

    def verdict(self, reading: MemoryReading) -> str:
        taken, target = reading.most_bytes, self.target_bytes
        what = f"{reading.name}: {taken / 1e9:.2f} GB at its peak, the target is {target / 1e9:.2f} GB"
        if taken <= target:
            return f"{what}: {(target - taken) / 1e9:.2f} GB are left"
        return f"{what}: {(taken - target) / 1e9:.2f} GB too much"

    def leaks(self) -> list[str]:
        """Names whose last blocks each ended with more than the one before."""
        found = []
        for name in dict.fromkeys(reading.name for reading in self.readings):
            ends = [reading.end_bytes for reading in self.readings if reading.name == name][-LEAK_REPEATS - 1 :]
            if len(ends) > LEAK_REPEATS and all(b - a > LEAK_SHARE * a for a, b in pairwise(ends)):
                found.append(
                    f"{name}: {LEAK_REPEATS} repeats kept {(ends[-1] - ends[0]) / 1e6:.0f} MB: something grows"
                )
        return found

    def changes(self) -> list[str]:
        if self.flags["model"] is None:
            return []
        found = self.estimate()
        peak, target = found.memory.peak_bytes, self.target_bytes
        fits = "fits" if peak <= target else "does not fit"
        lines = [f"the run needs {peak / 1e9:.2f} GB and {fits} into {target / 1e9:.2f} GB"]
        for one in sorted(found.suggestions, key=lambda one: one.peak_memory_bytes):
            if one.peak_memory_bytes < peak:
                enough = ", which fits" if peak > target >= one.peak_memory_bytes else ""
                assignments = " ".join(f"--set {assignment}" for assignment in one.assignments)
                lines.append(f"{assignments}: {one.peak_memory_bytes / 1e9:.2f} GB{enough}; {one.about}")
        return lines


def gpu() -> Any:
    """torch.cuda where the caller has loaded torch and it has a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def reset_gpu_peak() -> None:
    if cuda := gpu():
        cuda.reset_peak_memory_stats()


def gpu_peak_bytes() -> int:
    cuda = gpu()
    return int(cuda.max_memory_allocated()) if cuda else 0
