"""Engine processes: at most one a folder, in a session of its own, found again by whoever comes later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lorasmith.errors import Conflict
from lorasmith.files import try_lock
from lorasmith.jobs.folder import CONTROL, ERROR, LOG, RESULT, TAKEN, gone

LOCK = "engine.lock"
LOCK_VARIABLE = "LORASMITH_ENGINE_LOCK"
LOOK_S = 0.2  # `engine_runs`, of whoever asks, holds the lock for a moment, which is no engine

QUIET_LIBRARIES = {"PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


class EngineProcess:
    """The engine process of a folder, started here or adopted from a process that is gone.

    An adopted one is nobody's child: it has no exit status, and it lives as long as it holds the folder's lock. Where it
    is not to be seen, in another container, it cannot be signalled: it hears `control.json` alone.
    """

    def __init__(self, folder: Path, pid: int, started: int | None, child: subprocess.Popen[bytes] | None) -> None:
        self.folder, self.pid, self.started, self.child = folder, pid, started, child

    def is_alive(self) -> bool:
        return self.child.poll() is None if self.child else engine_runs(self.folder)

    def is_seen(self) -> bool:
        """Whether the process of that number is the engine. Number 0, of a row without one, would mean our own group."""
        return self.started is not None and process_started(self.pid) == self.started

    @property
    def returncode(self) -> int | None:
        return self.child.returncode if self.child else None

    def signal(self, number: int) -> None:
        """To the engine alone; nothing when it has ended, also when its number belongs to another process by now."""
        if self.is_alive() and self.is_seen():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End the engine and what it has started, at once."""
        if self.is_alive() and self.is_seen():
            os.killpg(self.pid, signal.SIGKILL)
        if self.child:
            self.child.wait()


def start_engine(folder: Path, cores: int | None = None) -> EngineProcess:
    """Start the engine on a folder, in a session of its own: a closed terminal or a Ctrl-C does not reach it.

    Raises `Conflict` while an engine runs there, and `NotFound` where there is no folder. The lock is taken here and handed on,
    so that there is no moment at which two of them could begin; it ends with the process, however that ends.
    """
    if not folder.is_dir():
        raise gone(folder)
    with (folder / LOCK).open("w") as lock, (folder / LOG).open("ab") as log:
        ends = time.monotonic() + LOOK_S
        while not try_lock(lock.fileno()):
            if time.monotonic() >= ends:
                raise Conflict(f"an engine process runs in {folder} already", hint="wait for it, or cancel the job")
            time.sleep(0.01)
        for stale in (RESULT, ERROR, CONTROL, TAKEN):
            (folder / stale).unlink(missing_ok=True)
        threads = {"OMP_NUM_THREADS": str(cores)} if cores else {}
        process = subprocess.Popen(
            [sys.executable, "-m", "lorasmith.engine", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock.fileno(),),
            env={**environment(), **threads, LOCK_VARIABLE: str(lock.fileno())},
        )
    return EngineProcess(folder, process.pid, process_started(process.pid), process)


def start_conversation(folder: Path) -> subprocess.Popen[bytes]:
    """Start an engine that reads turns from its standard input and answers on its standard output, as JSON lines."""
    with (folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lorasmith.engine", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            env=environment(),
        )


def environment() -> dict[str, str]:
    return {**QUIET_LIBRARIES, **os.environ}


def engine_runs(folder: Path) -> bool:
    """Whether an engine process holds the folder's lock."""
    if not (folder / LOCK).exists():
        return False
    with (folder / LOCK).open("r") as lock:
        return not try_lock(lock.fileno())


def process_started(pid: int) -> int | None:
    """Clock ticks from the machine's start to the process's: with the number it names one process only."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None
