"""The fault points by themselves: their list, their page, their orders and what they cost."""

from __future__ import annotations

import ast
import errno
import os
import re
import signal
import subprocess
import sys
import time
import timeit
from pathlib import Path

import pytest

from lorasmith import faults
from lorasmith.faults import FOLDER_STEPS, FOLDERS, POINTS, STEPS, Faults, fault_point

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "lorasmith"


def test_the_list_is_what_the_source_has() -> None:
    literal, folders, steps = [], [], []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            argument = node.args[0] if node.args else None
            if name == "fault_point" and isinstance(argument, ast.Constant):
                literal.append(argument.value)
            if name == "step" and isinstance(argument, ast.Constant) and path.name == "files.py":
                steps.append(argument.value)
            if name == "staged_folder":
                folders += [key.value.value for key in node.keywords if key.arg == "point"]  # type: ignore[attr-defined]
    assert sorted(literal) == sorted(STEPS), "each step stands at one place"
    assert sorted(folders) == sorted(FOLDERS)
    assert steps == list(FOLDER_STEPS)
    assert len(POINTS) >= 40


def test_the_page_lists_every_point() -> None:
    page = (ROOT / "docs" / "concepts" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z.-]+)` \| (.+) \|$", page, re.MULTILINE)
    assert dict(rows) == POINTS


def test_a_point_without_an_order_costs_less_than_a_microsecond() -> None:
    assert faults.FAULTS is None
    runs = timeit.repeat(lambda: fault_point("train.step"), timer=time.thread_time, number=10_000, repeat=20)
    assert min(runs) / 10_000 < 1e-6


def test_the_disk_is_full_at_the_second_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "FAULTS", Faults("train.step:2:enospc", None))
    fault_point("train.step")
    fault_point("train.saved")
    with pytest.raises(OSError, match="No space left on device, as ordered at train.step") as failure:
        fault_point("train.step")
    assert failure.value.errno == errno.ENOSPC
    fault_point("train.step")


def test_hits_of_several_processes_are_counted_together(tmp_path: Path) -> None:
    counts = tmp_path / "counts"
    environment = {**os.environ, "LORASMITH_FAULT": "train.step:3:kill", "LORASMITH_FAULT_COUNTS": str(counts)}
    code = "from lorasmith.faults import fault_point as at; at('train.step'); at('train.step')"
    ended = [subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode for _ in range(3)]
    assert ended == [0, -signal.SIGKILL, 0]
    assert [line.split()[0] for line in counts.read_text().splitlines()] == ["train.step"] * 5


@pytest.mark.parametrize("order", ["train.step", "train.step:0x:kill", "nowhere:1:kill", "train.step:1:hang"])
def test_an_order_that_means_nothing_is_refused(order: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {order!r}")):
        Faults(order, None)
