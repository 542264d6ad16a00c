from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from lorasmith.api.app import create_app
from lorasmith.schemas.jobs import JobKind
from lorasmith.services.jobs import create_job
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings, Settings
from lorasmith.store.database import DATABASE_NAME
from tests.api.conftest import BASE, V1
from tests.conftest import mounted

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(client: TestClient) -> Samples:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_what_the_home_holds_is_counted_when_it_is_asked(
    client: TestClient, add_dataset: Callable[..., object], workbench: Workbench
) -> None:
    before = read(client)
    add_dataset("sums")
    create_job(workbench, JobKind.TRAINING, "t", {}, {})
    after = read(client)
    assert (before["lorasmith_datasets", ()], after["lorasmith_datasets", ()]) == (0, 1)
    queued = ("lorasmith_jobs", (("status", "queued"),))
    assert (before[queued], after[queued]) == (0, 1)
    assert after["lorasmith_home_free_bytes", ()] > 0


def test_requests_are_counted_by_the_pattern_of_their_route(client: TestClient) -> None:
    for name in ("a", "b", "c"):
        client.get(f"{V1}/datasets/{name}")
    client.get("/nowhere/x")
    client.get("/healthz", headers={"Host": "evil.example"})
    found = read(client)
    pattern = (("method", "GET"), ("route", f"{V1}/datasets/{{dataset_id}}"))
    assert found["lorasmith_http_requests_total", (*pattern, ("status", "404"))] == 3
    assert found["lorasmith_http_request_seconds_count", pattern] == 3
    nowhere = (("method", "GET"), ("route", "none"))
    assert found["lorasmith_http_requests_total", (*nowhere, ("status", "404"))] == 1
    assert found["lorasmith_http_requests_total", (*nowhere, ("status", "403"))] == 1
    assert found["lorasmith_http_requests_running", ()] == 1


def test_a_server_without_room_is_alive_and_not_ready(workbench: Workbench, settings: ServerSettings) -> None:
    with mounted(workbench.home, megabytes=30):
        full = create_app(Workbench.open(Settings(home=workbench.home)), settings)
        with TestClient(full, base_url=BASE) as stranger:
            answer = stranger.get("/readyz")
            assert (answer.status_code, answer.json()) == (
                503,
                {"status": "not_ready", "checks": {"database": "ok", "disk": "full"}},
            )
            assert stranger.get("/healthz").status_code == 200


def test_a_server_whose_database_cannot_be_read_logs_why(
    stranger: TestClient, workbench: Workbench, caplog: pytest.LogCaptureFixture
) -> None:
    assert stranger.get("/readyz").json()["checks"] == {"database": "ok", "disk": "ok"}
    with closing(sqlite3.connect(workbench.home / DATABASE_NAME, isolation_level=None)) as connection:
        connection.execute("ALTER TABLE datasets RENAME TO away")
    answer = stranger.get("/readyz")
    assert (answer.status_code, answer.json()["checks"]["database"]) == (503, "unreadable")
    assert "no such table: datasets" in caplog.text
    assert "datasets" not in answer.text
