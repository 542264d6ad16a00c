"""`lorasmith data stats` on the command line, and its histogram."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.cli.data_statistics import BAR_CELLS, histogram, most_frequent
from lorasmith.schemas.statistics import Bin

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_json_and_page_without_a_model(lorasmith: Command, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"text {n},{'yes' if n % 3 else 'no'}\n" for n in range(30)))
    assert lorasmith("data", "import", rows, "--name", "rows").returncode == 0
    shown = lorasmith("data", "stats", "rows", "--json", "--output", tmp_path / "page.html")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert found["tokens"] is None
    assert sum(part["examples"] for part in found["parts"].values()) == 30
    assert sum(part["labels"].get("no", 0) for part in found["parts"].values()) == 10
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    again = lorasmith("data", "stats", "rows", "--output", tmp_path / "page.html")
    assert again.returncode == 4
    assert "page.html exists already" in again.stderr


def test_what_needs_a_model_says_so(lorasmith: Command) -> None:
    for option in (("--template", "chatml"), ("--max-seq-length", "64"), ("--estimate",)):
        refused = lorasmith("data", "stats", "any", *option)
        assert refused.returncode == 2
        assert f"{option[0]} is about tokens, which need --model" in refused.stderr


def test_a_histogram_reads_without_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: False, raising=False)
    bins = [Bin(start=0, end=100, count=1000), Bin(start=100, end=200, count=500), Bin(start=200, end=None, count=1)]
    full, half, tail = histogram(bins)
    assert full == f"   0–99  {'█' * BAR_CELLS} 1,000"
    assert half == f"100–199  {'█' * (BAR_CELLS // 2):<{BAR_CELLS}} 500"
    assert tail == f"   200+  {'▏':<{BAR_CELLS}} 1"  # one is not none


def test_only_the_most_frequent_are_shown() -> None:
    found = {"a": 6, "b": 3, "c\x1b[2J": 1}
    assert most_frequent(found, 10, 2) == "a 6 (60%), b 3 (30%) and 1 more"
    assert "\x1b" not in most_frequent(found, 10, 3)
