from __future__ import annotations

from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from lorasmith.api.routes import system
from lorasmith.schemas.jobs import JobKind
from lorasmith.services.jobs import create_job
from lorasmith.services.workbench import Workbench
from tests.api.conftest import V1

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


def test_a_server_without_room_is_alive_and_not_ready(stranger: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "NEEDED_FREE_BYTES", 2**70)
    answer = stranger.get("/readyz")
    assert (answer.status_code, answer.json()) == (
        503,
        {"status": "not_ready", "checks": {"database": "ok", "disk": "full"}},
    )
    assert stranger.get("/healthz").status_code == 200
