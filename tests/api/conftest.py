"""The real application on a workbench in a temporary home, and callers with and without its token."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lorasmith.api.app import create_app
from lorasmith.jobs.folder import EVENTS, LOG
from lorasmith.schemas.data import DataImportSpec, Dataset
from lorasmith.schemas.jobs import Job, JobStatus
from lorasmith.services.data_import import import_dataset
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings

BASE = "http://127.0.0.1:8420"
V1 = "/api/v1/finetune"

Makes = Callable[..., dict[str, Any]]


@pytest.fixture
def settings(tmp_path: Path) -> ServerSettings:
    roots = tmp_path / "roots"
    roots.mkdir()
    return ServerSettings(import_roots=(roots,), max_body_bytes=100_000, max_upload_bytes=1_000_000)


@pytest.fixture
def app(workbench: Workbench, settings: ServerSettings) -> FastAPI:
    return create_app(workbench, settings)


@pytest.fixture
def stranger(app: FastAPI) -> Iterator[TestClient]:
    """A caller without a token; the application's background work runs while it is open."""
    with TestClient(app, base_url=BASE, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def client(app: FastAPI, stranger: TestClient) -> TestClient:
    """A caller with the token."""
    stranger.headers["Authorization"] = f"Bearer {app.state.credentials.token.value}"
    return stranger


def rows(count: int) -> str:
    return "".join(f'{{"instruction": "Add 1 to {n}.", "output": "{n + 1}"}}\n' for n in range(count))


@pytest.fixture
def add_dataset(workbench: Workbench, tmp_path: Path) -> Callable[..., Dataset]:
    """Import rows as a dataset, as the command line does."""

    def add(name: str = "sums", text: str | None = None) -> Dataset:
        file = tmp_path / f"{name}.jsonl"
        file.write_text(rows(20) if text is None else text, encoding="utf-8")
        return import_dataset(workbench, file, DataImportSpec(name=name))

    return add


@pytest.fixture
def queue(client: TestClient, add_dataset: Callable[..., Dataset]) -> Makes:
    """Queue a run over REST; keyword arguments go into the request."""
    dataset = add_dataset()

    def make(**fields: Any) -> dict[str, Any]:
        answer = client.post(f"{V1}/jobs", json={"base_model": "starter", "dataset_id": dataset.id, **fields})
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"] == f"{V1}/jobs/{answer.json()['id']}"
        made: dict[str, Any] = answer.json()
        return made

    return make


def set_status(workbench: Workbench, job_id: str, status: JobStatus) -> None:
    def change(row: Job) -> None:
        row.status = status

    workbench.jobs.change(job_id, change)


@pytest.fixture
def running(workbench: Workbench, queue: Makes) -> Job:
    """A job in training whose engine has written 40 steps and three lines of log."""
    job = workbench.jobs.require(queue()["id"])
    set_status(workbench, job.id, JobStatus.TRAINING)
    folder = workbench.path(job.folder)
    write_steps(folder, 1, 40)
    (folder / LOG).write_text("one\ntwo\nthree\n", encoding="utf-8")
    return job


def write_steps(folder: Path, first: int, last: int) -> None:
    with (folder / EVENTS).open("a", encoding="utf-8") as file:
        for seq in range(first, last + 1):
            data = {"step": seq, "total_steps": 80, "loss": 1 / seq, "tokens_per_s": 10.0, "eta_s": 1.0}
            line = {"seq": seq, "time": "2026-01-01T00:00:00Z", "type": "step", "data": data}
            file.write(json.dumps(line) + "\n")
