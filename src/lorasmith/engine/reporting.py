"""What a running job says: numbered events in `events.jsonl`, and whether it has been asked to stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from lorasmith.errors import Cancelled, Interrupted, InvalidData, Paused
from lorasmith.faults import fault_point
from lorasmith.files import append_whole, cut_torn_line, disk_errors, read_json
from lorasmith.schemas.jobs import JobRequest, first_event, now

EVENTS, CONTROL, TAKEN = "events.jsonl", "control.json", "control.taken.json"


class Reporter:
    """Appends events to a job folder; numbering goes on where an earlier run of the folder stopped."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS
        cut_torn_line(self.path)
        self.seq = last_seq(self.path)
        self.stop_requested = False
        self.stop: type[Interrupted] = Interrupted

    def __call__(self, type: str, **data: Any) -> None:
        seq = self.seq + 1
        line = json.dumps({"seq": seq, "time": now().isoformat(), "type": type, "data": data}, ensure_ascii=False)
        with disk_errors(self.path):
            fault_point("event.numbered")
            append_whole(self.path, f"{line}\n".encode())
        self.seq = seq
        fault_point("event.appended")

    def poll(self) -> bool:
        """Read the control file: a pause or cancellation becomes a stop; returns whether a checkpoint is wanted now."""
        asked, taken = self.path.parent / CONTROL, self.path.parent / TAKEN
        try:
            asked.rename(taken)  # in one step: what is asked from now on is another request
        except FileNotFoundError:
            return False
        try:
            request = JobRequest(read_json(taken)["request"])
        except (InvalidData, ValueError, LookupError, TypeError):
            known = " or ".join(f'"{one}"' for one in JobRequest)
            self("warning", text=f'{CONTROL} is passed over: it is not {{"request": {known}}}')
            request = None
        fault_point("control.read")
        taken.unlink()
        fault_point("control.taken")
        if request in (JobRequest.PAUSE, JobRequest.CANCEL):
            self.stop_requested = True
            self.stop = Paused if request is JobRequest.PAUSE else Cancelled
        return request is JobRequest.CHECKPOINT

    def obey_signals(self) -> None:
        """First SIGINT or SIGTERM asks for a stop at the next safe point; the second one ends the process."""

        def ask(number: int, _: object) -> None:
            if self.stop_requested:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self.stop_requested = True

        signal.signal(signal.SIGINT, ask)
        signal.signal(signal.SIGTERM, ask)


class SilentReporter(Reporter):
    """For a process of a job that another one speaks for."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / EVENTS
        self.stop_requested = False
        self.stop = Interrupted

    def __call__(self, type: str, **data: Any) -> None:
        pass

    def poll(self) -> bool:
        return False


def last_seq(path: Path) -> int:
    """Number of the last event that can be read; 0 where there is none."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    last = first_event(reversed(lines))
    return last.seq if last else 0
