"""Follow an engine process, and say what came of it. The job outlives whoever watches it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from lorasmith.errors import STOPS, Interrupted, JobFailed, Killed
from lorasmith.jobs.folder import LOG, EventReader, log_tail, read_error, read_request, read_result
from lorasmith.jobs.processes import EngineProcess
from lorasmith.schemas.jobs import Event, JobRequest

POLL_S = 0.1
STOP_REQUESTS = (JobRequest.PAUSE, JobRequest.CANCEL)


def follow(
    folder: Path, process: EngineProcess, reader: EventReader, watch: Callable[[Event], None]
) -> dict[str, object]:
    """Show each event until the engine ends, then return `result.json`.

    The first Ctrl-C asks the engine to save and stop; the second kills it. Raises `Interrupted` when it has stopped
    with everything saved, `Killed` when the system killed it unasked, and `JobFailed` otherwise.
    """
    asked = False
    while True:
        try:
            ended = not process.is_alive()
            for event in reader.new_events():
                watch(event)
            if ended:
                break
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            if asked:
                process.kill()
                raise
            asked = True
            process.signal(signal.SIGTERM)
            watch(Event.model_validate({"seq": 0, "time": time.time(), "type": "stopping"}))
    return outcome(folder, process.returncode, asked=asked)


def outcome(folder: Path, returncode: int | None, *, asked: bool = False) -> dict[str, object]:
    """`result.json`, or the error it stands for. `asked`: somebody wanted the engine to stop.

    `returncode` is None for an engine that was somebody else's child.
    """
    result = read_result(folder)
    if result is not None:
        return result
    error = read_error(folder)
    if error is None and asked and returncode == -signal.SIGTERM:
        raise Interrupted("stopped before the engine process had begun")
    if error is None:
        tail = log_tail(folder)
        killed = returncode == -signal.SIGKILL
        failure = Killed if killed and not asked and read_request(folder) not in STOP_REQUESTS else JobFailed
        raise failure(
            f"the engine process {how_it_ended(returncode)}" + (f"; its last lines:\n{tail}" if tail else ""),
            code="oom" if killed else "crashed",
            hint=f"the whole log is {folder / LOG}",
        )
    if error.reason_code in STOPS:
        raise STOPS[error.reason_code](error.message, hint=error.hint)
    raise JobFailed(error.message, code=error.reason_code, hint=error.hint, exit_code=error.exit_code)


def how_it_ended(returncode: int | None) -> str:
    if returncode is None:
        return "ended without a word"
    return f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with status {returncode}"
