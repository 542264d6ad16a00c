"""Every operation of the OpenAPI document, called with data made from it: no server error, and answers as it says."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import load_all_checks
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lorasmith.api.app import create_app
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings, Settings

DOCUMENT = json.loads((Path(__file__).parents[2] / "docs" / "reference" / "openapi.json").read_text(encoding="utf-8"))
METHODS = ("get", "post", "put", "patch", "delete")
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
        case.call_and_validate(base_url=caller.url, headers=caller.headers, checks=CHECKS)

    check()
