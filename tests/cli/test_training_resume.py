"""`lorasmith train --resume` takes nothing beside it that it would not heed."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

Lorasmith = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.parametrize(
    "option",
    [
        ["--set", "training.max_steps=9"],
        ["--dry-run"],
        ["--config", "run.yaml"],
        ["--preset", "tiny"],
        ["--cores", "1"],
    ],
)
def test_options_beside_resume_are_refused(lorasmith: Lorasmith, option: list[str]) -> None:
    refused = lorasmith("train", "--resume", "job_of_anybody", *option)
    assert refused.returncode == 2
    assert f"--resume goes on with a job as it began, and takes no {option[0]}" in refused.stderr
