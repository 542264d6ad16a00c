"""What the first command of a new user costs, and who imports whom."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "lorasmith"
HEAVY = ("torch", "transformers", "peft", "matplotlib", "sqlalchemy", "alembic", "numpy")


@pytest.mark.parametrize(
    "statement",
    [
        "import lorasmith; lorasmith.LoRAConfig(r=4)",
        "import sys; sys.argv = ['lorasmith', '--help']\ntry:\n    from lorasmith.cli.app import main; main()\nexcept SystemExit: pass",
    ],
    ids=["import", "help"],
)
def test_starting_loads_nothing_heavy(statement: str) -> None:
    listing = f"{statement}\nimport sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_no_module_reads_or_writes_pickles() -> None:
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {"pickle", "dill", "joblib", "shelve"} & {alias.name for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "dill", "joblib", "shelve"), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), (
                    f"{path}:{node.lineno} uses a pickle through torch.{node.attr}"
                )


def test_remote_code_is_never_trusted() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8").replace("trust_remote_code=False", "")
        assert "trust_remote_code" not in text, path


def test_modules_stay_short_enough_to_read() -> None:
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, f"{path} has a second noun in it"
