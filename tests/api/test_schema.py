"""Every operation of the OpenAPI document, called with data made from it, alone and one after the other along its links: no
server error, answers as it says, and what is removed is gone."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from schemathesis.checks import load_all_checks
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ensure_resource_availability,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    use_after_free,
)

from lorasmith.api.app import create_app
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings, Settings

DOCUMENT = json.loads((Path(__file__).parents[2] / "docs" / "reference" / "openapi.json").read_text(encoding="utf-8"))
METHODS = ("get", "post", "put", "patch", "delete")
PREFIX = "/api/v1/finetune"
ENDLESS = ("/events",)  # streams, which tests/api/test_training.py reads
OPERATIONS = [
    (method.upper(), path)
    for path, found in DOCUMENT["paths"].items()
    for method in METHODS
    if method in found and not path.endswith(ENDLESS)
]
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
WALKS = 30
WALKED = {  # at least, each with an answer that is no error
    "GET /api/v1/finetune/datasets/{dataset_id}",
    "GET /api/v1/finetune/jobs/{job_id}",
    "POST /api/v1/finetune/jobs/{job_id}/pause",
    "POST /v1/fine_tuning/jobs/{job_id}/cancel",
}
load_all_checks()


class Caller(NamedTuple):
    """Where the server is, and what its callers send."""

    url: str
    headers: dict[str, str]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    """A real server on a home of its own."""
    workbench = Workbench.open(Settings(home=tmp_path_factory.mktemp("schema") / "home"))
    app = create_app(workbench, ServerSettings())
    app.state.logins.most = 10**9
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        headers = {"Authorization": f"Bearer {app.state.credentials.token.value}"}
        yield Caller(f"http://127.0.0.1:{listener.getsockname()[1]}", headers)
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def schema() -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_dict(DOCUMENT)


@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=[f"{method} {path}" for method, path in OPERATIONS])
def test_an_operation_does_what_its_description_says(
    method: str, path: str, caller: Caller, schema: schemathesis.BaseSchema
) -> None:
    operation = schema[path][method]
    modes = list(schemathesis.GenerationMode)

    @settings(
        max_examples=6,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=modes[0]) | operation.as_strategy(generation_mode=modes[1]))
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(base_url=caller.url, headers=caller.headers, checks=CHECKS, timeout=60)

    check()


def test_every_link_names_an_operation_and_its_parameter() -> None:
    found = {
        operation["operationId"]: {parameter["name"] for parameter in operation.get("parameters", [])}
        for methods in DOCUMENT["paths"].values()
        for method, operation in methods.items()
        if method in METHODS
    }
    links = DOCUMENT["components"]["links"]
    assert len(links) > 60
    for name, link in links.items():
        assert set(link.get("parameters", {})) <= found[link["operationId"]], name
    for noun in ("DatasetResource", "JobResource", "AdapterResource", "FineTuningJobResource"):
        assert f"{noun}_get_{'fine_tuning_job' if noun.startswith('Fine') else noun[:-8].lower()}" in links


def begin(caller: Caller, number: int) -> None:
    """Something to walk from: a dataset, a file of OpenAI's shape, and a job of each kind, the newest of their lists."""
    rows = "".join(f'{{"input": "{n} + {number}?", "output": "{n + number}"}}\n' for n in range(30))
    chat = "".join(
        f'{{"messages": [{{"role": "user", "content": "{n} + {number}?"}}, {{"role": "assistant", "content": "{n}"}}]}}\n'
        for n in range(30)
    )
    with httpx.Client(base_url=caller.url, headers={**caller.headers, "Prefer": "wait=60"}, timeout=90) as client:
        kept = client.post(f"{PREFIX}/datasets", data={"name": f"walk-{number}"}, files={"file": ("a.jsonl", rows)})
        assert kept.json()["status"] == "ready", kept.text
        job = {"base_model": "starter", "dataset_id": kept.json()["id"], "preset": "tiny"}
        assert client.post(f"{PREFIX}/jobs", json=job).status_code == 202
        file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", chat)})
        assert file.status_code == 200, file.text
        job = {"model": "starter", "training_file": file.json()["id"]}
        assert client.post("/v1/fine_tuning/jobs", json=job).status_code == 200


@pytest.mark.slow
def test_operations_one_after_the_other_do_what_their_descriptions_say(caller: Caller) -> None:
    """From an answer to what takes its id, along the links: create, read, change, remove, and once more."""
    linked = schemathesis.openapi.from_dict(DOCUMENT).exclude(path_regex="/events$")
    linked.config.update(base_url=caller.url)
    answered: Counter[str] = Counter()
    failures: dict[str, None] = {}

    class Walk(linked.as_state_machine()):  # type: ignore[misc]
        def get_call_kwargs(self, case: schemathesis.Case) -> dict[str, Any]:
            return {"headers": caller.headers}

        def validate_response(self, response: Any, case: schemathesis.Case, **kwargs: Any) -> None:
            answered[f"{case.operation.label} {response.status_code // 100}xx"] += 1
            kept = case.operation.path.startswith(
                f"{PREFIX}/jobs"
            )  # whose DELETE cancels, and leaves them to be looked at
            checks = [*CHECKS, ensure_resource_availability, *([] if kept else [use_after_free])]
            try:
                case.validate_response(response, checks=checks, recorder=self.recorder, transport_kwargs=kwargs)
            except (
                FailureGroup
            ) as group:  # raised, the walk would be played again, on a server that remembers the first
                failures[f"{case.as_curl_command()}: {[str(one) for one in group.exceptions]}"] = None

    for number in range(WALKS):
        begin(caller, number)
        run_state_machine_as_test(
            seed(number)(Walk),
            settings=settings(
                max_examples=1,
                stateful_step_count=20,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            ),
        )
    assert not failures, "\n".join(failures)
    reached = {step.removesuffix(" 2xx") for step in answered if step.endswith("2xx")}
    assert len(reached) >= 30
    assert reached >= WALKED
