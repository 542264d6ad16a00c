"""`lorasmith data preview --labels`: what it prints, and the JSON of an engine process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lorasmith.cli.data_labels import print_row
from lorasmith.schemas.labels import FailedCheck, LabelledExample, LabelledRow, LabelledToken

Command = Callable[..., "subprocess.CompletedProcess[str]"]

TOKENS = [
    ("<|im_start|>", "masked"),
    ("user\n", "masked"),
    (" two  spaces\t", "masked"),
    ("🙂", "cut"),
    ("", "cut"),
    ("<|im_end|>", "masked"),
    ("[b]\x1b[31m", "trained"),
    ("yes ", "trained"),
    ("<|im_end|>", "trained"),
    ("\n", "masked"),
]


def printed(row: LabelledRow) -> str:
    console = Console(width=80, highlight=False, force_terminal=False)
    with console.capture() as capture:
        print_row(console, row)
    return capture.get()


def row_of(tokens: list[tuple[str, str]], **fields: object) -> LabelledRow:
    labelled = [
        LabelledToken.model_validate(
            {"id": 0, "text": text, "role": role, "is_stop": text == "<|im_end|>", "is_special": text.startswith("<|")}
        )
        for text, role in tokens
    ]
    example = LabelledExample(tokens=labelled, total=len(tokens), trained=3, cut=2, stop_trained=True)
    values = {"row": 7, "example_id": "a", "fate": "cut", "failed_checks": [], "examples": [example], **fields}
    return LabelledRow.model_validate(values)


def test_roles_and_hidden_space_are_readable_without_colour() -> None:
    assert printed(row_of(TOKENS, reason="10 tokens, 2 more than 8")).splitlines() == [
        "row 7  cut  10 tokens, 2 more than 8",
        "10 tokens, 3 trained, 2 cut; the stop token is trained",
        "masked      3 │ <|im_start|>user⏎",
        "              │ ␣two␣␣spaces→",
        "cut         2 │ 🙂",
        "masked      1 │ <|im_end|>",
        "trained     2 │ [b]\\x1b[31myes␣",
        "stop        1 │ <|im_end|>",
        "masked      1 │ ⏎",
        "",
    ]


def test_a_failed_check_is_shown_with_the_ways_out() -> None:
    failed = FailedCheck(check="no-trained-token", sentence="no answer is left", mend="mend it", overridden=False)
    lines = printed(row_of([], fate="refused", failed_checks=[failed])).splitlines()
    assert lines[1:4] == [
        "fails `no-trained-token`: no answer is left",
        "  mend it",
        "  or override it: lorasmith train --set 'training.allow=[no-trained-token]'",
    ]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    conversations = [
        [("user", "Say a."), ("assistant", "a")],
        [("user", "Say b."), ("assistant", "b " * 100)],
        [("user", "<|im_end|>"), ("assistant", "c")],
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(
            json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"
            for turns in conversations
        ),
        encoding="utf-8",
    )
    return file


def test_an_engine_process_labels_the_rows_of_a_file(lorasmith: Command, rows_file: Path, tmp_path: Path) -> None:
    ran = lorasmith(
        "data", "preview", rows_file, "--labels", "--model", "starter", "--rows", "1-3", "--max-seq-length", "48",
        "--too-long", "right", "--json",
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout)
    assert (report["max_tokens"], report["too_long"]) == (48, "right")
    first, second, third = report["rows"]
    assert [row["fate"] for row in report["rows"]] == ["kept", "cut", "refused"]
    trained = [token for token in first["examples"][0]["tokens"] if token["role"] == "trained"]
    assert [(token["text"], token["is_stop"]) for token in trained] == [("a", False), ("<|im_end|>", True)]
    assert second["examples"][0]["total"] - second["examples"][0]["cut"] == 48
    assert third["failed_checks"][0]["check"] == "special-token-in-message"
    assert list((tmp_path / "home" / "previews").iterdir()) == []
    assert json.loads(lorasmith("jobs", "list", "--json").stdout) == []
