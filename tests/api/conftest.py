"""The real application on a workbench in a temporary home, and callers with and without its token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lorasmith.api.app import create_app
from lorasmith.schemas.data import DataImportSpec, Dataset
from lorasmith.services.data_import import import_dataset
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings

BASE = "http://127.0.0.1:8420"
V1 = "/api/v1/finetune"


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
