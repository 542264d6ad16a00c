"""`lorasmith data augment` and `data review`, as processes: what is printed, what stops and goes on, and where keys are."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lorasmith.cli.app import app
from lorasmith.schemas.augmentation import AugmentationSpec
from lorasmith.schemas.teachers import Reach
from lorasmith.services.augmentation import start_augmentation
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from tests.augmentation_jobs import run_job
from tests.teacher_stub import KEY, Stub, serving

SUPPORT = str(Path(__file__).parents[2] / "examples" / "support.jsonl")


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(Stub()) as started:
        yield started


@dataclass
class Shell:
    """Commands in the process of the test; the engine is a process of its own."""

    home: Path

    def __call__(self, *arguments: str, exits_with: int = 0) -> Result:
        result = CliRunner().invoke(app, ["--home", str(self.home), *arguments])
        assert result.exit_code == exits_with, result.output
        return result

    def said(self, *arguments: str, exits_with: int = 2) -> str:
        """What a command that is refused writes to stderr."""
        return self("data", *arguments, exits_with=exits_with).stderr

    def process(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lorasmith", "--home", str(self.home), *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


@pytest.fixture
def lorasmith(tmp_path: Path) -> Shell:
    """With the dataset `support`: 9 rows in train, 1 in val, 2 in test."""
    shell = Shell(tmp_path / "home")
    shell("data", "import", SUPPORT, "--name", "support", "--exact")
    return shell


def files_with(home: Path, text: str) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_from_a_dataset_to_a_reviewed_one_without_a_trace_of_the_key(
    tmp_path: Path, stub: Stub, lorasmith: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spent budget in between; the key is right at first and wrong then, and the endpoint repeats it in its error."""
    stub.needs_key = True
    options = ["--method", "rephrase", "--endpoint", stub.url, "--model", "stub", "--api-key-env", "TEACHER_KEY"]
    monkeypatch.setenv("TEACHER_KEY", KEY)
    first = ["--n", "2", "--max-rows", "3", "--name", "more", "--budget-requests", "2"]
    stopped = lorasmith("data", "augment", "support", *options, *first, exits_with=5)
    assert "the budget of 2 requests is spent, 2 of 3 rows are done" in stopped.stderr
    ran = lorasmith("data", "augment", "--resume", "more", "--budget-requests", "20", "--json")
    printed = json.loads(ran.stdout)
    assert printed["requests"] == 3
    assert printed["rows"] == {"answered": 3, "rejected": 0, "failed": 0, "skipped": 0}
    assert printed["candidates"] == {"pending": 6}
    listed = lorasmith("data", "review", "more")
    assert "pending" in listed.stdout
    assert "In other words, variant 1" in listed.stdout
    applied = lorasmith("data", "review", "more", "--reject", "1.1,1.2", "--accept-all", "--apply", "--json")
    assert json.loads(applied.stdout)["part_sizes"] == {"train": 13, "val": 1, "test": 2}
    shown = lorasmith("data", "show", "more").stdout
    assert "augmented          rephrase by stub at 127.0.0.1 4\n" in shown
    monkeypatch.setenv("TEACHER_KEY", f"wrong-{KEY}")
    refused = lorasmith("data", "augment", "support", *options, exits_with=1)
    assert "the teacher refuses: HTTP 401: wrong key Bearer [api key]" in refused.stderr
    output = "".join(one.stdout + one.stderr for one in (stopped, ran, listed, applied, refused))
    assert KEY not in output
    assert files_with(tmp_path / "home", KEY) == []
    assert files_with(tmp_path / "home", "TEACHER_KEY")  # the name of the variable is there


def test_ctrl_c_stops_with_everything_saved_and_resume_goes_on(tmp_path: Path, stub: Stub, lorasmith: Shell) -> None:
    """No row is asked about twice."""

    def slow_after_two(request: dict[str, Any], before: int) -> None:
        time.sleep(1.5 if len(stub.answered) >= 2 else 0.1)

    stub.rule = slow_after_two
    arguments = [
        "data",
        "augment",
        "support",
        "--method",
        "expand",
        "--endpoint",
        stub.url,
        "--model",
        "m",
        "--name",
        "r",
    ]
    started = lorasmith.process(*arguments, "--concurrency", "1")
    deadline = time.monotonic() + 300
    while len(stub.answered) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    _, said = started.communicate(timeout=300)
    assert started.returncode == 5, said
    assert "of 9 rows are done" in said
    assert "lorasmith data augment --resume JOB goes on" in said
    assert 2 <= len(stub.asked) < 9
    assert json.loads(lorasmith("data", "review", "r", "--json").stdout)["counts"] == {"pending": len(stub.asked)}
    stub.rule = None
    resumed = lorasmith("data", "augment", "--resume", "r", "--json")
    assert json.loads(resumed.stdout)["rows"]["answered"] == 9
    assert set(stub.asked.values()) == {1}


def test_a_reviewer_at_a_terminal_says_yes_no_edits_and_leaves(tmp_path: Path, stub: Stub, lorasmith: Shell) -> None:
    workbench = Workbench.open(Settings(home=lorasmith.home))
    teacher = {"endpoint": stub.url, "model": "m"}
    spec = AugmentationSpec.model_validate(
        {"data": "support", "method": "rephrase", "max_rows": 5, "name": "r", "teacher": teacher}
    )
    run_job(workbench, start_augmentation(workbench, spec, Reach(loopback=True)))
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nprintf 'Written by hand' > \"$1\"\n", encoding="utf-8")
    editor.chmod(0o755)
    terminal, other_end = pty.openpty()
    environment = {**os.environ, "EDITOR": str(editor), "VISUAL": ""}
    process = lorasmith.process("data", "review", "r", stdin=other_end, env=environment)
    os.close(other_end)
    os.write(terminal, b"y\nwhat?\nn\ne\ns\nq\n")
    shown, _ = process.communicate(timeout=300)
    os.close(terminal)
    assert process.returncode == 0
    assert "1.1, 1 of 5, score" in shown
    assert "source  My order 20417" in shown
    found = json.loads(lorasmith("data", "review", "r", "--all", "--json").stdout)
    states = [(item["state"], item["text"]) for item in found["items"]]
    assert [state for state, _ in states] == ["accepted", "rejected", "accepted", "pending", "pending"]
    assert states[2][1] == "Written by hand"
    assert found["counts"] == {"accepted": 2, "pending": 2, "rejected": 1}


def test_options_that_make_no_sense_are_refused(lorasmith: Shell) -> None:
    teacher = ("--endpoint", "http://127.0.0.1:9/v1", "--model", "m")
    rephrase = ("augment", "x", "--method", "rephrase")
    assert "NAME is missing" in lorasmith.said("augment")
    assert "--method is missing" in lorasmith.said("augment", "x")
    expected = "--method must be rephrase, expand, negative or back-translate, got 'reword'"
    assert expected in lorasmith.said("augment", "x", "--method", "reword", *teacher)
    assert "teacher.endpoint is missing" in lorasmith.said(*rephrase)
    assert "n: Input should be greater than or equal to 1, got 0" in lorasmith.said(*rephrase, *teacher, "-n", "0")
    assert "a language belongs to back-translate" in lorasmith.said(*rephrase, *teacher, "--language", "fr")
    expected = "--resume goes on with what the job was asked to do, and model would change it"
    assert expected in lorasmith.said("augment", "--resume", "x", "--model", "other")
    for arguments in (["--min-score", "0.5"], ["--accept-all", "--min-score", "2"], ["--name", "x"]):
        assert "goes with --" in lorasmith.said("review", "x", *arguments)
    assert "no job 'nothing'" in lorasmith.said("augment", "--resume", "nothing", exits_with=3)
    assert "no job 'nothing'" in lorasmith.said("review", "nothing", exits_with=3)
