"""`requests.jsonl`: each request before it is sent and each answer before it is used, on the disk.

An answer that stands there is never asked for again, whatever kills the process. A last line that a crash has torn is
cut off: its answer had not been acknowledged.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from lorasmith.errors import Conflict, InvalidData
from lorasmith.files import append_whole, cut_torn_line, disk_errors, try_lock
from lorasmith.schemas.teachers import REQUEST_LINE, Answered, Asked, Unanswered

REQUESTS = "requests.jsonl"


class RequestLedger:
    """Open for one process at a time: two that resume one job would pay for everything twice."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / REQUESTS
        self.answers: dict[str, Answered] = {}
        self.asked = self.repeated = self.estimated = self.prompt_tokens = self.completion_tokens = 0
        with disk_errors(self.path):
            self.file = self.path.open("ab")
        if not try_lock(self.file.fileno()):
            self.file.close()
            raise Conflict(f"another process works on {folder}", hint="wait for it, or stop it")
        cut_torn_line(self.path)
        with self.path.open(encoding="utf-8", newline="\n") as lines:
            for number, text in enumerate(lines, start=1):
                try:
                    self.note(REQUEST_LINE.validate_json(text))
                except ValueError as error:
                    raise InvalidData(f"{self.path}:{number} is damaged: {error}") from error

    def __enter__(self) -> RequestLedger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.file.close()

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def note(self, line: Asked | Answered | Unanswered) -> None:
        if isinstance(line, Asked):
            self.asked += 1
            self.repeated += line.attempt > 1
        elif isinstance(line, Answered):
            self.answers[line.request] = line
            self.prompt_tokens += line.prompt_tokens
            self.completion_tokens += line.completion_tokens
            self.estimated += line.estimated

    def add(self, line: Asked | Answered | Unanswered) -> None:
        """On the disk when this returns."""
        with disk_errors(self.path):
            append_whole(self.path, line.model_dump_json(exclude_none=True).encode() + b"\n")
            os.fsync(self.file.fileno())
        self.note(line)

    def forget(self, request: str) -> None:
        """Drop an answer from memory: what was made of it is kept elsewhere."""
        self.answers.pop(request, None)

    def forget_rows(self, rows: set[str]) -> None:
        """The same for all requests `ROW/…` of those rows."""
        self.answers = {key: line for key, line in self.answers.items() if key.partition("/")[0] not in rows}
