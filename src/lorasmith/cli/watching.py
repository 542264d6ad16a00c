"""Show a running job from its events: a live bar on a terminal, one line per interval elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from lorasmith.cli.output import console_err, duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from lorasmith.schemas.jobs import Event

PHASES = {
    "load": "loading the model",
    "tokenize": "tokenizing",
    "train": "training",
    "save": "saving",
    "rehearse": "rehearsing the memory of steps",
    "measure": "measuring a few layers",
    "ask": "asking the teacher",
}
LINE_EVERY_S = 10.0


class JobView:
    """Call it with each event. Use as a context manager, so that the bar is taken down whatever happens."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.console = console_err()
        self.progress: Progress | None = None
        self.task: TaskID | None = None
        self.last_line_at = 0.0
        self.validation_loss: float | None = None

    def __enter__(self) -> JobView:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=28),
                TextColumn("{task.fields[facts]}"),
            )
            self.progress = Progress(*columns, console=self.console, transient=True)
            self.progress.start()
            self.task = self.progress.add_task(self.title, total=None, facts="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()

    def __call__(self, event: Event) -> None:
        data = event.data
        if event.type == "phase":
            self.show(PHASES.get(data["name"], data["name"].replace("_", " ")), important=self.progress is None)
        elif event.type == "step":
            self.show(
                self.step_facts(data), data["step"], data["total_steps"], important=data["step"] == data["total_steps"]
            )
        elif event.type == "evaluation":
            self.validation_loss = data["loss"]
        elif event.type == "progress":
            last = data["done"] == data["total"]
            facts = f"{data['condition']}: {data['done']} of {data['total']}"
            if data.get("facts"):
                facts += f" · {data['facts']}"
            self.show(facts, data["done"], data["total"], important=last)
        elif event.type == "rows":
            self.print_rows(data)
        elif event.type in ("note", "warning"):
            self.print(f"{event.type}: {data['text']}")
        elif event.type == "resumed":
            self.print(f"going on from {data['checkpoint']}")
        elif event.type == "stopping":
            self.print("stopping after this step and saving; Ctrl-C again to quit at once")

    def step_facts(self, data: dict[str, float]) -> str:
        validation = f" · validation {self.validation_loss:.3f}" if self.validation_loss is not None else ""
        return (
            f"step {data['step']}/{data['total_steps']} · loss {data['loss']:.3f}{validation} · "
            f"{data['tokens_per_s']:,.0f} tokens/s · {duration(data['eta_s'])} left"
        )

    def print_rows(self, data: dict[str, int]) -> None:
        """How many rows train, and what became of those that were too long."""
        counts = [
            f"{data['train']:,} rows with {data['tokens']:,} tokens, {data['trained_tokens'] / data['tokens']:.0%} of them trained"
        ]
        counts += [f"{data[fate]:,} rows too long: {fate}" for fate in ("dropped", "cut", "split") if data[fate]]
        if data["validation_dropped"]:
            counts.append(f"{data['validation_dropped']:,} validation rows too long: dropped")
        self.print(" · ".join(counts))

    def show(
        self, facts: str, done: float | None = None, total: float | None = None, *, important: bool = False
    ) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=done, total=total, facts=facts)
        elif important or time.monotonic() - self.last_line_at >= LINE_EVERY_S:
            self.last_line_at = time.monotonic()
            self.print(facts)

    def print(self, text: str) -> None:
        self.console.print(f"{self.title}: {text}", markup=False)
