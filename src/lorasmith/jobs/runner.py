"""Run a job in an engine process of its own and follow it. The job outlives whoever watches it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lorasmith.errors import STOPS, Interrupted, JobFailed, Killed
from lorasmith.jobs.folder import (
    CONTROL,
    ERROR,
    LOG,
    RESULT,
    EventReader,
    log_tail,
    read_error,
    read_request,
    read_result,
)
from lorasmith.schemas.jobs import Event, JobRequest

POLL_S = 0.1
STOP_REQUESTS = (JobRequest.PAUSE, JobRequest.CANCEL)

# oneDNN keeps a compiled kernel for each matrix shape; rows of many lengths would fill its 1,024 places, at a gigabyte.
FEWER_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
QUIET_LIBRARIES = {"PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def start_engine(folder: Path) -> subprocess.Popen[bytes]:
    """Start the engine on a folder, in a session of its own: a closed terminal or a Ctrl-C does not reach it."""
    (folder / RESULT).unlink(missing_ok=True)
    (folder / ERROR).unlink(missing_ok=True)
    (folder / CONTROL).unlink(missing_ok=True)
    with (folder / LOG).open("ab") as log:
        return spawn(folder, stdin=subprocess.DEVNULL, stdout=log.fileno(), stderr=log.fileno())


def start_conversation(folder: Path) -> subprocess.Popen[bytes]:
    """Start an engine that reads turns from its standard input and answers on its standard output, as JSON lines."""
    with (folder / LOG).open("ab") as log:
        return spawn(folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.fileno())


def spawn(folder: Path, *, stdin: int, stdout: int, stderr: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lorasmith.engine", str(folder)],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
        env={**FEWER_KERNELS, **QUIET_LIBRARIES, **os.environ},
    )


def follow(
    folder: Path, process: subprocess.Popen[bytes], reader: EventReader, watch: Callable[[Event], None]
) -> dict[str, object]:
    """Show each event until the engine ends, then return `result.json`.

    The first Ctrl-C asks the engine to save and stop; the second kills it. Raises `Interrupted` when it has stopped
    with everything saved, `Killed` when the system killed it unasked, and `JobFailed` otherwise.
    """
    asked = False
    while True:
        try:
            ended = process.poll() is not None
            for event in reader.new_events():
                watch(event)
            if ended:
                break
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            if asked:
                process.kill()
                process.wait()
                raise
            asked = True
            process.send_signal(signal.SIGTERM)
            watch(Event.model_validate({"seq": 0, "time": time.time(), "type": "stopping"}))
    return outcome(folder, process.returncode, asked=asked)


def outcome(folder: Path, returncode: int, *, asked: bool = False) -> dict[str, object]:
    """`result.json`, or the error it stands for. `asked`: somebody wanted the engine to stop."""
    result = read_result(folder)
    if result is not None:
        return result
    error = read_error(folder)
    if error is None and asked and returncode == -signal.SIGTERM:
        raise Interrupted("stopped before the engine process had begun")
    if error is None:
        how = (
            f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with status {returncode}"
        )
        tail = log_tail(folder)
        killed = returncode == -signal.SIGKILL
        failure = Killed if killed and not asked and read_request(folder) not in STOP_REQUESTS else JobFailed
        raise failure(
            f"the engine process {how}" + (f"; its last lines:\n{tail}" if tail else ""),
            code="oom" if killed else "crashed",
            hint=f"the whole log is {folder / LOG}",
        )
    if error.reason_code in STOPS:
        raise STOPS[error.reason_code](error.message, hint=error.hint)
    raise JobFailed(error.message, code=error.reason_code, hint=error.hint, exit_code=error.exit_code)
