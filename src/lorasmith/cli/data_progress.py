"""How far an import is: a bar on a terminal, one line every ten seconds elsewhere, nothing for a small file."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from lorasmith.cli.output import console_err, size

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

    from lorasmith.services.data_progress import Progress

LINE_EVERY_S = 10.0
SHOWN_AFTER_S = 1.0


class ImportView:
    """Call it with each progress. Use as a context manager, so that the bar is taken down whatever happens."""

    def __init__(self) -> None:
        self.console = console_err()
        self.bar: Bar | None = None
        self.task: TaskID | None = None
        self.started_at = self.line_at = time.monotonic()

    def __enter__(self) -> ImportView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, progress: Progress) -> None:
        if progress.phase == "continuing":
            self.console.print(f"going on behind row {progress.rows:,}, where an earlier import stopped", markup=False)
            return
        now = time.monotonic()
        if sys.stderr.isatty():
            if now - self.started_at > SHOWN_AFTER_S:
                self.show_bar(progress)
        elif now - self.line_at >= LINE_EVERY_S:
            self.line_at = now
            self.console.print(f"{progress.phase}: {facts(progress)}", markup=False)

    def show_bar(self, progress: Progress) -> None:
        if self.bar is None or self.task is None:
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=28), TextColumn("{task.fields[facts]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
            self.bar.start()
            self.task = self.bar.add_task(progress.phase, total=progress.total, facts="")
        self.bar.update(
            self.task,
            description=progress.phase,
            completed=progress.done,
            total=progress.total,
            facts=facts(progress),
        )


def facts(progress: Progress) -> str:
    if progress.phase == "comparing":
        return f"{progress.done:,} rows"
    if progress.phase == "writing":
        return f"{progress.done:,} of {progress.total:,} rows"
    return f"{size(progress.done)} of {size(progress.total)}, {progress.rows:,} rows"
