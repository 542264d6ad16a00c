"""Pages are programs: each command and snippet runs in the order of its page, each link leads somewhere.

In a page, `<!-- not run: reason -->` above a block leaves it out, `<!-- exits with N -->` expects that status, and
`<!-- home: headers -->` starts the page in a home that holds the adapter `headers`, and `<!-- teacher: stub -->` with a
server that answers at `$TEACHER`. A `text` block directly below a
`bash` block is what it prints (stderr where it fails); `…` in it stands for anything.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorasmith.services.training import build_spec
from tests.pages import FENCE, Block, blocks
from tests.teacher_stub import Stub, serving
from tools.write_reference import REFERENCE, pages

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").iterdir())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADERS = ("train", "--model", "starter", "--data", "signatures", "--preset", "tiny", "--name", "headers")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # on a busy machine, two threads that wait for each other take ten times as long


SLOW = {  # half a minute and more; README.md is as long, and a stranger's first
    "docs/concepts/adapter.md",
    "docs/concepts/job.md",
    "docs/getting-started.md",
    "docs/guides/bring-your-data.md",
    "docs/guides/estimate.md",
    "docs/guides/evaluate.md",
    "docs/guides/export.md",
    "docs/guides/python.md",
    "docs/guides/train.md",
}


def executed(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language in ("bash", "python") and block.not_run is None]


def page_id(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `lorasmith` and `python` in it, whatever is installed."""
    folder = tmp_path_factory.mktemp("bin")
    for name, module in (("lorasmith", " -m lorasmith"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def home_with_headers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("docs") / "home"
    command = [sys.executable, "-m", "lorasmith", "--home", str(home), *HEADERS, "--set", "training.max_steps=2"]
    ran = subprocess.run(
        command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=False, timeout=600
    )
    assert ran.returncode == 0, ran.stderr
    return home


@pytest.fixture
def teacher() -> Iterator[Stub]:
    with serving(Stub()) as stub:
        yield stub


def executed_pages() -> list[Any]:
    pages = [page for page in PAGES if executed(page)]
    return [
        pytest.param(page, marks=pytest.mark.slow if page_id(page) in SLOW else (), id=page_id(page)) for page in pages
    ]


@pytest.mark.parametrize("page", executed_pages())
def test_every_block_of_a_page_runs(
    page: Path, commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    home = tmp_path / "home"
    if "<!-- home: headers -->" in page.read_text(encoding="utf-8"):
        shutil.copytree(request.getfixturevalue("home_with_headers"), home)
    folder = tmp_path / "work"
    shutil.copytree(ROOT / "examples", folder / "examples")
    monkeypatch.setenv("LORASMITH_HOME", str(home))
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", ONE_THREAD["OMP_NUM_THREADS"])
    monkeypatch.chdir(folder)
    if "<!-- teacher: stub -->" in page.read_text(encoding="utf-8"):
        monkeypatch.setenv("TEACHER", request.getfixturevalue("teacher").url)
    namespace: dict[str, object] = {"__name__": "__docs__"}
    for block in executed(page):
        where = f"{page_id(page)}:{block.line}"
        if block.language == "python":
            exec(compile("\n" * block.line + block.code, str(page), "exec"), namespace)
        else:
            run_shell(block, where)


def run_shell(block: Block, where: str) -> None:
    ran = subprocess.run(
        ["bash", "-eu", "-c", block.code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ran.returncode == block.exits_with, f"{where} ended with {ran.returncode}:\n{ran.stderr}"
    if block.output is not None:
        printed = without_trailing_blanks(ran.stdout if block.exits_with == 0 else ran.stderr)
        expected = without_trailing_blanks(block.output)
        pattern = ".*?".join(re.escape(piece) for piece in expected.split("…"))
        assert re.fullmatch(pattern, printed, re.DOTALL), f"{where} printed\n{printed}\nand the page says\n{expected}"


def without_trailing_blanks(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()).strip()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_block_names_its_language_and_each_one_left_out_its_reason(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) == 2 * len(FENCE.findall(text)), "a fence without a language"
    for block in blocks(page):
        assert block.language in ("bash", "python", "ts", "yaml", "json", "text", "make"), f"{page}:{block.line}"
        if block.language == "python":
            ast.parse(block.code)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in (match["target"] for match in LINK.finditer(text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page_id(page)} links to {target}"
        if heading:
            assert heading in headings(file), f"{page_id(page)} links to {target}"


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_run_in_yaml_is_a_valid_one(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language != "yaml" or block.not_run is not None:
            continue
        values = yaml.safe_load(block.code)
        if {"lora", "training", "preset"} & set(values):
            config = tmp_path / "run.yaml"
            config.write_text(block.code, encoding="utf-8")
            build_spec({"model": values.get("model", "starter"), "data": values.get("data", "any")}, config=config)


def test_every_example_is_used_by_a_page_and_imported_or_run() -> None:
    ran = "\n".join(block.code for page in PAGES for block in executed(page))
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for example in EXAMPLES:
        assert f"examples/{example.name}" in ran or f'"{example.name}"' in tests, f"nothing runs {example}"
        assert any(f"examples/{example.name}" in page.read_text(encoding="utf-8") for page in PAGES), example


def test_generated_pages_are_up_to_date() -> None:
    for name, text in pages().items():
        assert (REFERENCE / name).read_text(encoding="utf-8") == text, f"{name} is stale: make docs"


def test_the_errors_page_names_each_code_that_the_source_gives() -> None:
    page = (REFERENCE / "errors.md").read_text(encoding="utf-8")
    given = re.compile(r'\b(?:reason_)?code(?:: str)? ?= ?"([a-z_]+)"')
    for path in (ROOT / "src").rglob("*.py"):
        for code in given.findall(path.read_text(encoding="utf-8")):
            assert f"`{code}`" in page, f"{path} gives {code}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_page_talks_down(page: Path) -> None:
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    assert not re.search(r"\b(simply|just|obviously)\b", prose, re.IGNORECASE), page
