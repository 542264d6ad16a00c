"""`lorasmith data` in this process, and small files for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from lorasmith.cli.context import Shell
from lorasmith.cli.data import app
from lorasmith.errors import LorasmithError

FOX = "The quick brown fox jumps over the lazy dog and then it sleeps in the warm sun for a while"
CLIPS = "How many clips did Natalia sell altogether in April and May, if she sold 48 in April?"
ROWS = [
    ("Tell a story.", FOX),
    ("tell a  story.", FOX),
    ("Tell a story.", f"{FOX} longer"),
    ("What is open?", "All of it."),
    ("What is open?", "Nothing at all."),
    ("what is open?", "ALL OF IT."),
    (CLIPS, "72 clips"),
]


def run(home: Path, *arguments: str) -> Result:
    result = CliRunner().invoke(app, list(arguments), obj=Shell(home=home), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def error_of(home: Path, *arguments: str) -> LorasmithError:
    with pytest.raises(LorasmithError) as caught:
        run(home, *arguments)
    return caught.value


def write_chats(path: Path, pairs: list[tuple[str, str]], **own: Any) -> str:
    rows = [{"input": question, "output": answer, **own} for question, answer in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
