"""`lorasmith data dedup`, `split`, `lineage`, `replay` and `rm` of versions: what is printed, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorasmith.cli.context import Shell
from lorasmith.cli.data import app
from lorasmith.errors import InvalidSpec
from tests.cli.data_cases import ROWS, error_of, run, write_chats


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def rows(home: Path, tmp_path: Path) -> Path:
    source = write_chats(tmp_path / "rows.jsonl", ROWS)
    run(home, "import", source, "--name", "rows", "--split", "100/0/0")
    return Path(source)


def test_dedup_prints_both_versions_and_undoing_gives_the_first_one_back(home: Path, rows: Path) -> None:
    imported = json.loads(run(home, "show", "rows", "--json").stdout)
    result = run(home, "dedup", "rows", "--threshold", "0.8")
    after = json.loads(run(home, "show", "rows", "--json").stdout)
    assert result.stdout.splitlines() == [
        f"dataset  rows, version rows@{after['sha256'][:12]}",
        "parts    train 4, val 0, test 0",
        "rows     kept 4, exact_duplicate 0, near_duplicate 3, rejected 0",
        f"before   rows@{imported['sha256'][:12]}: train 7, val 0, test 0; kept 7, exact_duplicate 0, rejected 0",
    ]
    assert result.stderr == "the rows were hashed, which is kept for next time\n"
    again = run(home, "dedup", "rows", "--threshold", "0.8")
    assert again.stderr == "nothing changed: no new version was made\nnothing was hashed again\n"
    undone = json.loads(run(home, "dedup", "rows", "--off", "--json").stdout)
    assert (undone["id"], undone["sha256"]) == (imported["id"], imported["sha256"])


def test_the_ledger_follows_the_version_and_can_be_written_to_a_file(home: Path, rows: Path, tmp_path: Path) -> None:
    run(home, "dedup", "rows", "--threshold", "0.8")
    near = json.loads(run(home, "ledger", "rows", "--fate", "near_duplicate", "--json").stdout)
    assert [(line["row"], line["duplicate_of_row"]) for line in near] == [(1, 3), (2, 3), (6, 4)]
    assert near[0]["reason"] == "similarity 0.83 with row 3"
    run(home, "ledger", "rows", "--fate", "near_duplicate", "--output", str(tmp_path / "near.jsonl"))
    written = (tmp_path / "near.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in written] == near
    imported = json.loads(run(home, "lineage", "rows", "--json").stdout)[0]["sha256"]
    assert json.loads(run(home, "ledger", f"rows@{imported[:8]}", "--fate", "near_duplicate", "--json").stdout) == []


def test_lineage_replay_and_show_name_steps_parents_and_versions(home: Path, rows: Path) -> None:
    run(home, "dedup", "rows")
    run(home, "split", "rows", "--split", "60/20/20", "--salt", "s")
    steps = json.loads(run(home, "lineage", "rows", "--json").stdout)
    assert [step["operation"] for step in steps] == ["import", "dedup", "split"]
    digests = [step["sha256"][:12] for step in steps]
    table = run(home, "lineage", "rows").stdout
    assert all(digest in table for digest in digests)
    assert "threshold 0.8" in table
    shown = run(home, "show", "rows").stdout
    assert "made by            import → dedup → split\n" in shown
    assert f"parents            rows@{digests[1]}\n" in shown
    assert f"versions           rows@{digests[0]}, rows@{digests[1]}, rows@{digests[2]}\n" in shown
    done = json.loads(run(home, "replay", "rows", "--json").stdout)
    assert (done["equal"], len(done["steps"])) == (True, 3)
    assert run(home, "replay", "rows").stdout.count("equal") == 3


def test_a_replay_that_differs_is_printed_and_fails(home: Path, rows: Path) -> None:
    rows.write_text(rows.read_text(encoding="utf-8") + '{"input": "new", "output": "row"}\n', encoding="utf-8")
    result = CliRunner().invoke(app, ["replay", "rows"], obj=Shell(home=home))
    assert result.exit_code == 1
    assert "differs" in result.stdout
    result = CliRunner().invoke(app, ["replay", "rows", "--json"], obj=Shell(home=home))
    assert result.exit_code == 1
    assert json.loads(result.stdout)["steps"][0]["difference"].startswith("the source changed: its sha256 was ")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["dedup", "rows", "--off", "--threshold", "0.8"], "give --threshold or --off, not both"),
        (["dedup", "rows", "--threshold", "0.3"], "the similarity threshold must be between 0.4 and 1, got 0.3"),
        (["split", "rows"], "say what is to change: --split, --salt, --exact or --stratify"),
        (
            ["split", "rows", "--stratify", "lable"],
            "--stratify must be label, none, got 'lable'; did you mean 'label'?",
        ),
        (
            ["split", "rows", "--exact", "--stratify", "label"],
            "--exact cuts all rows and --stratify each label: give one of them",
        ),
        (
            ["split", "rows", "--split", "50/20/20"],
            "--split must be three shares that add up to 100, with some for train, got '50/20/20'",
        ),
        (
            ["dedup", "rows", "--name", "a/b"],
            "--name must be 1 to 64 letters, digits, dots, dashes or underscores, and begin with a letter or digit, "
            "got 'a/b'",
        ),
    ],
)
def test_wrong_options_are_refused(home: Path, rows: Path, command: list[str], message: str) -> None:
    error = error_of(home, *command)
    assert isinstance(error, InvalidSpec)
    assert error.message == message


def test_one_version_is_removed_by_its_digits_and_a_used_one_needs_force(home: Path, rows: Path) -> None:
    run(home, "dedup", "rows")
    imported, fewer = (step["sha256"][:12] for step in json.loads(run(home, "lineage", "rows", "--json").stdout))
    error = error_of(home, "rm", f"rows@{imported}", "--yes")
    assert error.message == f"the dataset 'rows@{imported}' is used by dataset rows@{fewer}"
    assert error.exit_code == 4
    run(home, "rm", f"rows@{imported}", "--yes", "--force")
    assert f"versions           rows@{fewer}\n" in run(home, "show", "rows").stdout
    again = run(home, "dedup", "rows", "--off")  # the index went with the version that had read the rows
    assert "parts    train 7" in again.stdout


def test_contamination_and_leakage_take_rows_out_and_restore_brings_them_back(
    home: Path, rows: Path, tmp_path: Path
) -> None:
    imported = json.loads(run(home, "show", "rows", "--json").stdout)
    bench = write_chats(tmp_path / "bench.jsonl", ROWS[-1:])
    result = run(home, "contamination", "rows", "--benchmark", bench, "--reject")
    assert "rows     kept 6, exact_duplicate 0, leaks 1, rejected 0\n" in result.stdout
    (line,) = json.loads(run(home, "ledger", "rows", "--fate", "leaks", "--json").stdout)
    assert (line["row"], line["leaks_into"], line["reason"]) == (
        7,
        "bench.jsonl item 1 (exact)",
        "holds bench.jsonl item 1 (exact)",
    )
    assert run(home, "leakage", "rows", "--reject").stderr == "nothing changed: no new version was made\n"
    restored = run(home, "restore", f"rows@{imported['sha256'][:8]}")
    assert restored.stdout.splitlines() == [
        f"dataset  rows, version rows@{imported['sha256'][:12]}",
        "parts    train 7, val 0, test 0",
    ]
    assert json.loads(run(home, "show", "rows", "--json").stdout) == imported
    assert error_of(home, "contamination", "rows", "--benchmark", bench, "--reject", "--part", "val").message == (
        "--reject takes rows out of every part: leave --part out"
    )
