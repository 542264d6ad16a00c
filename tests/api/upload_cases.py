"""A file sent as a form, and whether anything is left of it."""

from __future__ import annotations

from typing import Any

import httpx
from starlette.testclient import TestClient

from lorasmith.services.workbench import Workbench
from tests.api.conftest import V1

DATASETS = f"{V1}/datasets"
WAIT = {"Prefer": "wait=60"}


def send(
    client: TestClient, content: bytes | str, file_name: str = "rows.jsonl", headers: Any = None, **fields: str
) -> httpx.Response:
    data = {"name": "sums", **fields}
    return client.post(DATASETS, data=data, files={"file": (file_name, content)}, headers={**WAIT, **(headers or {})})


def nothing_is_left(workbench: Workbench) -> bool:
    uploads = workbench.path("uploads")
    return workbench.datasets.list() == [] and (not uploads.exists() or list(uploads.iterdir()) == [])
