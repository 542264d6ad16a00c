"""A job folder seen from outside: write the order, read what the engine says. The engine is another process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lorasmith.errors import NotFound
from lorasmith.files import MANIFEST, end_of_whole_lines, read_json_if_there, write_json
from lorasmith.schemas.jobs import Event, JobError, JobOrder, JobRequest, now, read_event

ORDER, EVENTS, LOG, RESULT, ERROR = "job.json", "events.jsonl", "log.txt", "result.json", "error.json"
CONTROL, TAKEN, KILLED, CHECKPOINTS = "control.json", "control.taken.json", "killed.json", "checkpoints"


def write_order(folder: Path, order: JobOrder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / ORDER, order.model_dump(mode="json"))


def write_request(folder: Path, request: JobRequest) -> None:
    """The engine reads it between two steps."""
    write_json(folder / CONTROL, {"request": request.value})


def read_request(folder: Path) -> JobRequest | None:
    """What the engine was asked and has not read."""
    asked = read_json_if_there(folder / CONTROL)
    return None if asked is None else JobRequest(asked["request"])


def note_kill(folder: Path) -> None:
    """The next engine of the folder computes half as much at once."""
    write_json(folder / KILLED, {"signal": "SIGKILL"})


def newest_checkpoint_name(folder: Path) -> str:
    """`step-…` of the newest committed checkpoint, or an empty string."""
    return max((checkpoint.name for checkpoint in checkpoint_folders(folder)), default="")


def checkpoint_folders(folder: Path) -> list[Path]:
    """Those that are whole, oldest first; a running engine removes the oldest ones."""
    return sorted(manifest.parent for manifest in (folder / CHECKPOINTS).glob(f"step-*/{MANIFEST}"))


def read_result(folder: Path) -> dict[str, object] | None:
    return read_json_if_there(folder / RESULT)


def write_error(folder: Path, error: JobError) -> None:
    """What the engine could not write itself."""
    write_json(folder / ERROR, error.model_dump())


def read_error(folder: Path) -> JobError | None:
    """What ended the job, or that its folder is gone; None where nothing is said."""
    error = read_json_if_there(folder / ERROR)
    if error is not None:
        return JobError.model_validate(error)
    if folder.is_dir():
        return None
    missing = gone(folder)
    return JobError(reason_code=missing.code, message=missing.message, hint=missing.hint, exit_code=missing.exit_code)


def gone(folder: Path) -> NotFound:
    return NotFound(f"the job's folder {folder} is gone", hint="put it back and resume the job, or begin another one")


class EventReader:
    """Reads whole event lines as they appear; a line still being written is left for the next call."""

    def __init__(self, folder: Path, *, from_now: bool = False) -> None:
        self.path = folder / EVENTS
        self.offset = 0
        if from_now and self.path.exists():
            with self.path.open("rb") as handle:
                self.offset = end_of_whole_lines(handle)  # the next engine cuts off what a crash left after it

    def new_events(self) -> Iterator[Event]:
        if not self.path.exists():
            return
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            for line in handle:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield read_event(line) or unreadable(self.path, self.offset)


def unreadable(path: Path, end: int) -> Event:
    text = f"the line of {path} that ends at byte {end} is no event, and is passed over"
    return Event(seq=0, time=now(), type="warning", data={"text": text})


def log_tail(folder: Path, lines: int = 15) -> str:
    path = folder / LOG
    if not path.exists():
        return ""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
