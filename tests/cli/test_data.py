"""`lorasmith data`: what is printed where, and each option that is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorasmith.cli.context import Shell
from lorasmith.cli.data import app
from lorasmith.cli.data_view import visible
from lorasmith.errors import InvalidSpec, LorasmithError, NotFound
from tests.cli.data_cases import error_of, run

EXAMPLES = Path(__file__).parents[2] / "examples"
SUPPORT = str(EXAMPLES / "support.jsonl")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_import_prints_format_parts_and_fates_and_the_next_command(home: Path) -> None:
    result = run(home, "import", SUPPORT, "--name", "support", "--exact")
    assert result.stdout.splitlines() == [
        "dataset  support",
        "format   chatml, because it has `messages`",
        "parts    train 9, val 1, test 2",
        "rows     kept 12, exact_duplicate 0, rejected 0",
    ]
    assert result.stderr == "next: lorasmith train --model starter --data support --preset tiny\n"


def test_import_says_what_it_did_not_use(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text("text,stars\n" + "".join(f"row {n},{n}\n" for n in range(2)), encoding="utf-8")
    output = run(home, "import", str(source), "--name", "a").stdout
    assert "not used  stars 2\n" in output
    assert "note      2 groups cannot fill 3 parts: all are in train\n" in output


def test_every_printing_command_speaks_json(home: Path) -> None:
    imported = json.loads(run(home, "import", SUPPORT, "--name", "support", "--json").stdout)
    assert json.loads(run(home, "show", "support", "--json").stdout) == {**imported, "tokens_bytes": 0}
    assert json.loads(run(home, "list", "--json").stdout) == [imported]
    assert len(json.loads(run(home, "preview", "support", "-n", "2", "--json").stdout)) == 2
    assert len(json.loads(run(home, "ledger", "support", "--json").stdout)) == 12
    assert json.loads(run(home, "ledger", "support", "--fate", "rejected", "--json").stdout) == []
    assert json.loads(run(home, "rm", "support", "--yes", "--json").stdout) == {"removed": [imported["id"]]}


def test_list_show_preview_and_ledger_print_for_a_reader(home: Path) -> None:
    assert "no datasets yet" in run(home, "list").stderr
    run(home, "import", str(EXAMPLES / "texts.jsonl"), "--name", "tickets")
    run(home, "import", SUPPORT, "--name", "support", "--exact")
    assert "tickets" in run(home, "list").stdout
    shown = run(home, "show", "support").stdout
    assert "answer characters  mean 1" in shown
    assert f"source             {SUPPORT}\n" in shown
    preview = run(home, "preview", "support", "-n", "1").stdout
    assert "  user: My order 20417 still says 'packing' after three days. Is something wrong?\n" in preview
    assert "  text: ticket: " in run(home, "preview", "tickets", "-n", "1").stdout
    assert "kept" in run(home, "ledger", "support").stdout


def test_prepare_writes_the_folder_and_may_import_it(home: Path, tmp_path: Path) -> None:
    interactions, output = str(EXAMPLES / "interactions.jsonl"), str(tmp_path / "prepared")
    metadata = json.loads(run(home, "prepare", interactions, "--output", output, "--json").stdout)
    assert metadata["total_examples"] == 8
    assert not home.exists()
    result = run(home, "prepare", interactions, "--output", output, "--name", "agents", "--force")
    assert f"folder       {output}\n" in result.stdout
    assert "train.jsonl  6 examples\n" in result.stdout
    assert result.stderr == "next: lorasmith train --model starter --data agents --preset tiny\n"
    assert "agents" in run(home, "list").stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            ["--format", "alpacca"],
            "--format must be auto, alpaca, sharegpt, chatml, completion, interactions, chat, classification, "
            "summarization, preference or kto, got 'alpacca'; did you mean 'alpaca'?",
        ),
        (["--split", "80/10/5"], "--split must be three shares that add up to 100, with some for train, got '80/10/5'"),
        (["--split", "80/20"], "--split must be three shares that add up to 100, with some for train, got '80/20'"),
        (["--split", "0/50/50"], "--split must be three shares that add up to 100, with some for train, got '0/50/50'"),
        (["--split", "a/b/c"], "--split must be three shares that add up to 100, with some for train, got 'a/b/c'"),
        (["--split", "nan/1/1"], "--split must be three shares that add up to 100, with some for train, got 'nan/1/1'"),
        (["--max-rejected", "5"], "--max-rejected must be a share from 0 to 1, got 5"),
    ],
)
def test_wrong_options_of_an_import_are_refused(home: Path, option: list[str], message: str) -> None:
    error = error_of(home, "import", SUPPORT, "--name", "support", *option)
    assert isinstance(error, InvalidSpec)
    assert error.message == message


def test_wrong_names_parts_and_fates_are_refused(home: Path) -> None:
    assert error_of(home, "import", SUPPORT, "--name", "../support").message == (
        "--name must be 1 to 64 letters, digits, dots, dashes or underscores, and begin with a letter or digit, "
        "got '../support'"
    )
    run(home, "import", SUPPORT, "--name", "support")
    assert error_of(home, "preview", "support", "--part", "trian").message == (
        "--part must be train, val or test, got 'trian'; did you mean 'train'?"
    )
    assert error_of(home, "ledger", "support", "--fate", "reject").message == (
        "--fate must be kept, changed, exact_duplicate, near_duplicate, leaks, rejected, cut, split, dropped, refused, "
        "got 'reject'; did you mean 'rejected'?"
    )
    error = error_of(home, "show", "suport")
    assert isinstance(error, NotFound)
    assert error.message == "no dataset 'suport'; did you mean 'support'?"


def test_preview_takes_rows_from_any_part_and_files_that_are_not_imported(home: Path) -> None:
    assert run(home, "preview", SUPPORT, "--row", "7").stdout.startswith("row 7, example ")
    shown = json.loads(run(home, "preview", SUPPORT, "--rows", "3-5", "--json").stdout)
    assert [example["row"] for example in shown] == [3, 4, 5]
    assert "no datasets yet" in run(home, "list").stderr
    assert error_of(home, "preview", SUPPORT, "--row", "99").message == (
        f"no example of {SUPPORT} comes from row 99; the last one is row 12"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--row", "1", "--rows", "1-2"], "give --row or --rows, not both"),
        (["--rows", "5-1"], "--rows must be two row numbers from 1 up, the first not above the last, got '5-1'"),
        (["--rows", "0"], "--rows must be two row numbers from 1 up, the first not above the last, got '0'"),
        (["--max-seq-length", "64"], "--max-seq-length says how a row is labelled, which is shown with --labels"),
        (["--labels"], "--labels needs --model: its tokenizer and template make the tokens"),
        (
            ["--labels", "--model", "starter", "--too-long", "chop"],
            "too_long: Input should be 'error', 'drop', 'left', 'right', 'split' or 'cut', got 'chop'",
        ),
    ],
)
def test_wrong_options_of_a_preview_are_refused(home: Path, options: list[str], message: str) -> None:
    assert error_of(home, "preview", SUPPORT, *options).message == message


def test_removing_asks_before_it_removes(home: Path) -> None:
    run(home, "import", SUPPORT, "--name", "support")
    error = error_of(home, "rm", "support")
    assert (error.message, error.hint) == ("removing 'support' needs --yes", "lorasmith data rm support --yes")
    assert "support" in run(home, "list").stdout
    run(home, "rm", "support", "--yes")
    assert "no datasets yet" in run(home, "list").stderr


def test_shares_may_be_fractions(home: Path) -> None:
    imported = json.loads(
        run(home, "import", SUPPORT, "--name", "support", "--split", "0.5/0.25/0.25", "--exact", "--json").stdout
    )
    assert imported["part_sizes"] == {"train": 6, "val": 3, "test": 3}


def test_ledger_lines_are_chosen_by_flag_and_written_to_a_file(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"input": "Mail?", "output": "ann@mail.org"}\n{"input": "b", "output": "c"}\n', encoding="utf-8")
    assert "flags    personal-data 1\n" in run(home, "import", str(source), "--name", "rows").stdout
    (line,) = json.loads(run(home, "ledger", "rows", "--flag", "personal-data", "--json").stdout)
    assert line["flags"][0]["found"] == "an e-mail address at character 1"
    run(home, "ledger", "rows", "--fate", "kept", "--output", str(tmp_path / "kept.jsonl"))
    assert len((tmp_path / "kept.jsonl").read_text(encoding="utf-8").splitlines()) == 2
    assert error_of(home, "ledger", "rows", "--flag", "secrets").message.endswith("did you mean 'secret'?")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--map", "output"], "--map must be field=column, got 'output'"),
        (["--map", "outptu=a"], "--map names the field 'outptu', which no format has; did you mean 'output'?"),
        (["--map", "output=a"], f"--map names the column 'a', which {SUPPORT} does not have"),
        (["--mend", "quotes"], "--mend must be control-characters, mojibake, join-turns, got 'quotes'"),
        (["--min-chars", "output"], "--min-chars must be field=characters, got 'output'"),
        (["--tokenizer", "nobody"], "no model 'nobody'"),
    ],
)
def test_wrong_checks_of_an_import_are_refused(home: Path, option: list[str], message: str) -> None:
    assert error_of(home, "import", SUPPORT, "--name", "support", *option).message == message


def test_data_cannot_steer_the_terminal() -> None:
    assert visible("a\x1b[31mb\u202ec\nd\té") == "a\\x1b[31mb\\u202ec\nd\té"


def test_the_commands_load_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'pandas', 'numpy', 'sqlalchemy', 'pydantic'}"
    code = f"import sys, lorasmith.cli.data; print(sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert loaded.stdout.strip() == "[]"


GAPS = "input,output\nWhat is open?,All of it.\nWho is there?,\nMail?,ann@mail.org\n"


def test_validate_prints_a_line_for_each_finding_and_fails_where_an_import_would(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "gaps.csv"
    source.write_text(GAPS, encoding="utf-8")
    result = run(home, "validate", str(source), "--max-rejected", "0.4")
    assert result.stdout.splitlines() == [
        "gaps.csv:3: row 2, field `output`: found an empty text, expected the answer as text (unusable, rejected)",
        "gaps.csv:4: row 3, field `messages[1].content`: found an e-mail address at character 1, expected no personal data "
        "(personal-data)",
        f"source    {source}",
        "format    chat, because it has `input` and `output`",
        "rows      kept 2, exact_duplicate 0, rejected 1",
        "findings  unusable 1, personal-data 1",
        "import    would succeed",
    ]
    error = error_of(home, "validate", str(source))
    assert error.exit_code == 1
    assert error.message == f"1 of 3 rows of {source} cannot be used, more than the allowed share of 0"
    assert "no datasets yet" in run(home, "list").stderr


def test_validate_speaks_json_also_where_it_fails(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "gaps.csv"
    source.write_text(GAPS, encoding="utf-8")
    with pytest.raises(LorasmithError) as caught:
        CliRunner().invoke(app, ["validate", str(source), "--json"], obj=Shell(home=home), catch_exceptions=False)
    failed = CliRunner().invoke(app, ["validate", str(source), "--json"], obj=Shell(home=home))
    report = json.loads(failed.stdout)
    assert (report["passes"], report["error"]) == (False, caught.value.message)
    assert [(one["check"], one["line"]) for one in report["findings"]] == [("unusable", 3), ("personal-data", 4)]
    assert report["counts"] == {"unusable": 1, "personal-data": 1}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--format", "alpacca"], "--format must be auto, alpaca, "),
        (["--max-rejected", "5"], "--max-rejected must be a share from 0 to 1, got 5"),
        (["--mend", "quotes"], "--mend must be control-characters, mojibake, join-turns, got 'quotes'"),
        (["--reject", "secrets"], "--reject must be unusable, "),
    ],
)
def test_wrong_options_of_a_validation_are_refused(home: Path, option: list[str], message: str) -> None:
    assert error_of(home, "validate", SUPPORT, *option).message.startswith(message)


def test_prepare_takes_several_domains(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "domains"
    folder.mkdir()
    for name in ("financial", "legal"):
        lines = (f'{{"input": "{name} question {n}", "output": "answer {n}"}}\n' for n in range(40))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    arguments = ["prepare", str(folder), "--output", str(tmp_path / "out"), "--domains", "financial, legal"]
    result = run(home, *arguments, "--max-samples", "20", "--near-duplicates", "0.8", "--json")
    prepared = json.loads(result.stdout)
    assert {name: one["total_examples"] for name, one in prepared.items()} == {"financial": 20, "legal": 20}
    shown = run(home, *arguments, "--name", "my", "--force").stdout
    assert "my-financial" in shown
    assert "my-legal" in run(home, "list").stdout
    assert error_of(home, *arguments[:-1], "a,../b").message == (
        "--domains must be names of letters, digits, dashes or underscores, got '../b'"
    )
    assert error_of(home, *arguments, "--near-duplicates", "0.2").message == (
        "--near-duplicates must be a similarity from 0.4 to 1, got 0.2"
    )
