"""The TypeScript client: generated from this tree's OpenAPI document, typed, and at work against a real server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lorasmith.schemas.data import DataImportSpec
from lorasmith.services.access import api_token
from lorasmith.services.data_import import import_dataset
from lorasmith.services.jobs import job_events
from lorasmith.services.workbench import Workbench
from tests.pages import blocks

SERVER_GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "server.md"
WEB = Path(__file__).parents[1] / "web"


@pytest.fixture(scope="module")
def npm() -> None:
    """node, and the packages of `web/`."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    if not (WEB / "node_modules").is_dir():
        missing.append("web/node_modules (make web)")
    if missing:
        reason = f"without {', '.join(missing)} nothing is known about the client"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def run(*command: str, environment: dict[str, str] | None = None) -> str:
    ran = subprocess.run(
        command,
        cwd=WEB,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_generated_types_are_those_of_the_document(npm: None) -> None:
    """Else: npm --prefix web run client"""
    run("npm", "run", "client", "--", "--check")


@pytest.fixture
def server(workbench: Workbench) -> Iterator[str]:
    command = [sys.executable, "-m", "lorasmith", "--home", str(workbench.home), "serve", "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    yield json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")["url"]
    process.terminate()
    process.wait()


@pytest.mark.slow
def test_the_example_lists_queues_follows_and_cancels(
    npm: None, workbench: Workbench, server: str, tmp_path: Path
) -> None:
    """From a real server and engine, with a stream that is left and taken up again by its `Last-Event-ID`.

    What tsc builds first has passed its types, and web/tests/refused_by_types.ts says what these must refuse.
    """
    rows = tmp_path / "support.jsonl"
    rows.write_text("".join(f'{{"instruction": "Say {n}.", "output": "{n}"}}\n' for n in range(20)), encoding="utf-8")
    import_dataset(workbench, rows, DataImportSpec(name="support"))
    guide = WEB / "src" / "guide.ts"
    (block,) = (block.code for block in blocks(SERVER_GUIDE) if block.language == "ts")
    guide.write_text(block.replace("http://127.0.0.1:8421", server), encoding="utf-8")
    try:
        run("npm", "run", "build")
    finally:
        guide.unlink()
    token = {"LORASMITH_TOKEN": api_token(workbench.home)}
    printed = run("node", "build/examples/jobs.js", server, environment=token).splitlines()
    (job,) = workbench.jobs.newest(limit=2)
    assert job.status == "cancelled"
    assert printed[:4] == [
        "datasets: support 20",
        f"job: {job.name} queued rank {job.spec['lora']['rank']}",
        "listed: true",
        "refused: 404 not_found no dataset 'nothing' (GET /api/v1/finetune/datasets lists them; POST there uploads one)",
    ]
    said = [line.split()[-2:] for line in printed if "said:" in line]
    events = [[str(event.seq), event.type] for event in job_events(workbench, job)]
    assert said == events  # without a gap, and without a repetition where the stream was taken up again
    assert f"then said: {events[-1][0]} ended" in printed
    assert printed[-2:] == ["then: cancelled", "then: end"]

    assert run("node", "build/src/guide.js", environment=token).count("loss:") == 2  # the guide's run has two steps
