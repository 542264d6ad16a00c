"""What a command cannot read or write is one sentence."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

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
