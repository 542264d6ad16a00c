"""What is shipped: the wheel holds the starter, and its demo runs where only the wheel is installed."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_everything_the_demo_needs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    for needed in (
        "lorasmith/starter/model/model.safetensors",
        "lorasmith/starter/data/signatures.jsonl.gz",
        "lorasmith/starter/NOTICE",
        "lorasmith/starter/LICENSE.psf",
        "lorasmith/store/migrations/versions/0001_nouns.py",
        "lorasmith/engine/evaluation/report.html.jinja",
    ):
        assert needed in names
    assert not any(name.startswith(("tests/", "tools/")) for name in names)


@pytest.mark.slow
def test_the_installed_wheel_runs_the_demo(wheel: Path, tmp_path: Path) -> None:
    """Dependencies come from this environment; the package itself from the wheel alone."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", str(wheel)], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (here,) = {Path(path) for path in sys.path if path.endswith("site-packages") and (Path(path) / "torch").is_dir()}
    (site / "dependencies.pth").write_text(f"{here}\n", encoding="utf-8")
    where = subprocess.run(
        [python, "-c", "import lorasmith; print(lorasmith.__file__)"], capture_output=True, text=True, check=True
    )
    assert where.stdout.startswith(str(tmp_path))
    ran = subprocess.run(
        [tmp_path / "venv" / "bin" / "lorasmith", "--home", tmp_path / "home", "demo"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "exact_match" in ran.stdout
