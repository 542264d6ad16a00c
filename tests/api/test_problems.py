from __future__ import annotations

from pathlib import Path

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lorasmith.api.problems import without_paths
from tests.api.conftest import V1


def test_an_error_is_a_problem_with_code_and_hint(client: TestClient, add_dataset) -> None:  # type: ignore[no-untyped-def]
    add_dataset("support")
    answer = client.get(f"{V1}/datasets/suport")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "urn:lorasmith:problem:not_found",
        "title": "Not Found",
        "status": 404,
        "detail": "no dataset 'suport'; did you mean 'support'?",
        "code": "not_found",
        "hint": "known datasets: support",
    }


def test_wrong_fields_are_pointed_at_all_at_once(client: TestClient) -> None:
    answer = client.put(f"{V1}/datasets/x", json={"name": "../x", "colour": "red"})
    assert answer.status_code == 422
    assert answer.json()["code"] == "invalid_request"
    assert {(one["where"], one["pointer"]) for one in answer.json()["errors"]} == {
        ("body", "/name"),
        ("body", "/colour"),
    }
    query = client.get(f"{V1}/datasets", params={"limit": 0})
    assert [(one["where"], one["pointer"]) for one in query.json()["errors"]] == [("query", "/limit")]


def test_a_body_that_is_no_json_says_where(client: TestClient) -> None:
    answer = client.put(f"{V1}/datasets/x", content='{"name": }', headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["detail"] == "not valid JSON: Expecting value at character 9"


@pytest.mark.parametrize(("method", "path", "status", "code"), [
    ("GET", "/nowhere", 404, "not_found"),
    ("DELETE", f"{V1}/datasets", 405, "method_not_allowed"),
])  # fmt: skip
def test_what_is_not_there(method: str, path: str, status: int, code: str, client: TestClient) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


def test_an_error_of_ours_tells_nothing(app: FastAPI, client: TestClient) -> None:
    def broken() -> None:
        raise RuntimeError(f"secret of {__file__}")

    app.add_api_route("/broken", broken)
    answer = client.get("/broken")
    assert answer.status_code == 500
    assert answer.json()["code"] == "internal"
    assert "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(("text", "shown"), [
    ("/home/ann/.lorasmith/jobs/job_1/log.txt is gone", "jobs/job_1/log.txt is gone"),
    ("nothing in /home/ann/.lorasmith", "nothing in the home folder"),
    ("/opt/models/tiny holds no config.json", "tiny holds no config.json"),
    ("'/usr/lib/python3/x.py': broken", "'x.py': broken"),
    ("POST /api/v1/finetune/models adds one", "POST /api/v1/finetune/models adds one"),
    ("train/val/test, 80/10/10, org/model", "train/val/test, 80/10/10, org/model"),
    ("see https://example.org/a/b", "see https://example.org/a/b"),
])  # fmt: skip
def test_paths_of_the_server_stay_there(text: str, shown: str) -> None:
    assert without_paths(text, Path("/home/ann/.lorasmith")) == shown
