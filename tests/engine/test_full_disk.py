"""A training engine whose disk is full says so, and goes on once there is room."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.errors import DiskFull
from lorasmith.files import read_json
from lorasmith.jobs.folder import EventReader, read_error
from tests.conftest import mounted, read_only
from tests.engine.small_jobs import events

Job = Callable[..., Path]


def started(folder: Path, log: Path, fault: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lorasmith.engine", str(folder)]
    environment = {**os.environ, **({"LORASMITH_FAULT": fault} if fault else {})}
    with log.open("wb") as handle:
        return subprocess.Popen(command, stdout=handle, stderr=handle, env=environment)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("fault", ["event.numbered:1:enospc", ""], ids=["event", "log"])
def test_the_error_is_there_where_the_log_cannot_be_written(qwen2_folder: Path, training_job: Job, fault: str) -> None:
    folder = training_job(qwen2_folder)
    with started(folder, Path("/dev/full"), fault) as process:
        assert process.wait(120) == DiskFull.exit_code
    error = read_error(folder)
    assert error is not None
    assert error.reason_code == "disk_full"
    assert events(folder, "ended")[0]["message"].startswith(f"the disk is full: writing below {folder} failed with")
    assert not (folder / "reserve").exists()


def test_a_crash_is_told_where_the_log_cannot_be_written(qwen2_folder: Path, training_job: Job) -> None:
    folder = training_job(qwen2_folder)
    with started(folder, Path("/dev/full"), "event.numbered:1:eio") as process:
        assert process.wait(120) == 1
    assert read_json(folder / "error.json")["reason_code"] == "crashed"


def test_a_folder_that_takes_nothing_any_more_is_told_in_the_log(
    qwen2_folder: Path, training_job: Job, tmp_path: Path
) -> None:
    folder, log = training_job(qwen2_folder, num_epochs=2000), tmp_path / "log.txt"
    with started(folder, log) as process:
        until_it_takes_steps(folder)
        with read_only(folder):
            assert process.wait(120) == 1
    assert log.read_text(encoding="utf-8").splitlines()[-1] == (
        f"writing below {folder} failed: the file system is read-only"
    )
    assert "Traceback" not in log.read_text(encoding="utf-8")


def test_the_file_of_tensorboard_may_be_what_does_not_fit(
    qwen2_folder: Path, training_job: Job, tmp_path: Path
) -> None:
    folder = training_job(qwen2_folder, num_epochs=2000)
    (folder / "tb").mkdir()
    with mounted(folder / "tb", megabytes=1):
        fill(folder / "tb", but_bytes=4096)
        with started(folder, tmp_path / "log.txt") as process:
            assert process.wait(120) == DiskFull.exit_code
    error = read_error(folder)
    assert error is not None
    assert error.reason_code == "disk_full"
    assert steps(folder)


def test_a_run_goes_on_after_its_disk_was_full(qwen2_folder: Path, training_job: Job) -> None:
    """The events, TensorBoard's file, the log and the next checkpoint all lie on that disk."""
    folder = training_job(qwen2_folder, num_epochs=2000, save_every=1000)
    order = (folder / "job.json").read_bytes()
    with mounted(folder, megabytes=12):
        (folder / "job.json").write_bytes(order)
        with started(folder, folder / "log.txt") as process:
            until_it_takes_steps(folder)
            fill(folder)
            assert process.wait(120) == DiskFull.exit_code
        error = read_error(folder)
        assert error is not None
        assert error.reason_code == "disk_full"
        assert numbers(folder) == list(range(1, len(numbers(folder)) + 1))
        (folder / "filler").unlink()
        reader = EventReader(folder, from_now=True)
        before = numbers(folder)
        with started(folder, folder / "log.txt") as process:
            while not any(event.type == "step" for event in reader.new_events()):
                assert process.poll() is None
                time.sleep(0.02)
            process.terminate()
            assert process.wait(120) == 5
        assert numbers(folder) == list(range(1, len(numbers(folder)) + 1))
        assert len(numbers(folder)) > len(before)


def until_it_takes_steps(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not steps(folder):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def fill(folder: Path, but_bytes: int = 0) -> None:
    with (folder / "filler").open("wb", buffering=0) as handle:
        while (free := shutil.disk_usage(folder).free) > but_bytes:
            handle.write(bytes(free - but_bytes))


def steps(folder: Path) -> list[int]:
    return [event.seq for event in EventReader(folder).new_events() if event.type == "step"]


def numbers(folder: Path) -> list[int]:
    return [event.seq for event in EventReader(folder).new_events()]
