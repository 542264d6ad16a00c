"""What a command cannot read or write is one sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import read_only

Lorasmith = Callable[..., subprocess.CompletedProcess[str]]


def test_a_folder_that_takes_no_job_is_named(lorasmith: Lorasmith, tmp_path: Path) -> None:
    jobs = tmp_path / "home" / "jobs"
    jobs.mkdir(parents=True)
    order = ("train", "--model", "starter", "--data", "signatures", "--preset", "tiny", "--detach")
    with read_only(jobs):
        refused = lorasmith(*order)
        told = lorasmith("--debug", *order)
    assert refused.returncode == told.returncode == 1
    assert refused.stderr.startswith(f"error: {jobs}/job_")
    assert refused.stderr.endswith(": Read-only file system\n\nhint: lorasmith --debug shows where\n")
    assert "Traceback" in told.stderr
    assert "queued" in lorasmith(*order).stdout


@pytest.mark.parametrize(
    ("streams", "code", "said"),
    [
        ("<&- >&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 1, "error: No space left on device\n\nhint: lorasmith --debug shows where\n"),
    ],
)
def test_a_closed_stream_leads_nowhere_and_a_full_one_is_one_sentence(
    tmp_path: Path, streams: str, code: int, said: str
) -> None:
    command = f"{sys.executable} -m lorasmith --home {tmp_path} jobs list {streams}"
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (code, said)
    assert ended.stdout == ""
