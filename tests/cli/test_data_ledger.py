"""`lorasmith data ledger` without an engine: counts, and combinations that make no sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lorasmith.cli.context import Shell
from lorasmith.cli.data import app
from lorasmith.errors import InvalidSpec


@pytest.fixture
def home(tmp_path: Path) -> Path:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\n" + "".join(f"text {n % 8},yes\n" for n in range(10)), encoding="utf-8")
    run(tmp_path / "home", "import", str(rows), "--name", "rows")
    return tmp_path / "home"


def run(home: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), obj=Shell(home=home), catch_exceptions=False)


def test_the_fates_add_up_to_all_rows(home: Path) -> None:
    summary = json.loads(run(home, "ledger", "rows", "--summary", "--json").stdout)
    assert summary["fates"] == {"kept": 8, "exact_duplicate": 2, "rejected": 0}
    assert summary["rows"] == 10
    assert summary["cut_tokens"] is None
    assert run(home, "ledger", "rows", "--summary").stdout.splitlines()[1:] == [
        "rows     10",
        "fates    kept 8, exact_duplicate 2, rejected 0",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fate", "cut"], "rows are cut when a model is trained on them"),
        (["--max-seq-length", "96"], "how rows are trained is asked of a model"),
        (["--preset", "tiny"], "how rows are trained is asked of a model"),
        (["--job", "job_1", "--model", "starter"], "--job names a run, which has a model and settings of its own"),
        (["--summary", "--fate", "kept"], "--summary counts all rows and writes no file"),
        (["--model", "starter", "--too-long", "middle"], "training.too_long: Input should be 'error'"),
    ],
)
def test_what_makes_no_sense_is_refused(home: Path, options: list[str], message: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        run(home, "ledger", "rows", *options)
    assert refused.value.message.startswith(message)
