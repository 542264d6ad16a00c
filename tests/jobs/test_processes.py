"""Signals reach the engine of a folder, or nobody."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasmith.errors import Conflict
from lorasmith.files import try_lock
from lorasmith.jobs.processes import LOCK, process_started, start_engine

ADOPT = """
import signal, sys, time
from pathlib import Path
from lorasmith.jobs.processes import EngineProcess, engine_runs
folder, pid, started, patience_s = sys.argv[1:]
process = EngineProcess(Path(folder), int(pid), int(started) if started else None, None)
assert process.is_alive()
process.signal(signal.SIGTERM)
if sys.argv[2] == "0":
    process.kill()
ends = time.monotonic() + float(patience_s)
while engine_runs(Path(folder)) and time.monotonic() < ends:
    time.sleep(0.02)
print("it runs" if engine_runs(Path(folder)) else "it has ended")
"""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the folder's lock as an engine does."""
    hold = f"import fcntl, time; f = open({str(tmp_path / LOCK)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def adopted(
    folder: Path, pid: int, started: int | None, *around: str, patience_s: float = 0.5
) -> subprocess.CompletedProcess[str]:
    """Signal it, and wait so long for its end."""
    command = [*around, sys.executable, "-c", ADOPT, str(folder), str(pid), str(started or ""), str(patience_s)]
    return subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)


def test_an_adopted_engine_hears_a_signal(engine: subprocess.Popen[bytes], tmp_path: Path) -> None:
    ran = adopted(tmp_path, engine.pid, process_started(engine.pid), patience_s=60)
    assert (ran.returncode, ran.stdout) == (0, "it has ended\n"), ran.stderr


def test_an_engine_whose_number_was_never_stored_does_not_end_who_adopts_it(
    engine: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Its worker died between the start and the row: the number 0 is the caller's own group."""
    ran = adopted(tmp_path, 0, None)
    assert (ran.returncode, ran.stdout) == (0, "it runs\n"), ran.stderr


def test_an_engine_of_another_container_is_not_mistaken_for_a_process_of_this_one(
    engine: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    around = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*around, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make namespaces")
    for number in (1, engine.pid):  # 1 is the adopting process itself there
        ran = adopted(tmp_path, number, process_started(engine.pid), *around)
        assert (ran.returncode, ran.stdout) == (0, "it runs\n"), ran.stderr


def test_an_engine_starts_beside_somebody_who_looks_whether_one_runs(tmp_path: Path) -> None:
    with (tmp_path / LOCK).open("w") as looking:
        assert try_lock(looking.fileno())
        ended = threading.Timer(0.05, looking.close)
        ended.start()
        process = start_engine(tmp_path)
        process.kill()
        ended.join()


def test_a_second_engine_does_not_start(engine: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="an engine process runs in"):
        start_engine(tmp_path)
