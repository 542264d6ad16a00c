"""A server behind a proxy, whether the proxy takes its path off or not."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from lorasmith.api.app import create_app
from lorasmith.errors import InvalidSpec
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings

MODELS = "/api/v1/finetune/models"
PAGE = {"Origin": "https://lora.example", "Host": "lora.example"}


@pytest.fixture
def client(workbench: Workbench) -> TestClient:
    settings = ServerSettings(root_path="/x/y", allowed_hosts=("lora.example",))
    return TestClient(create_app(workbench, settings), base_url="http://lora.example")


@pytest.fixture
def authorized(client: TestClient) -> dict[str, str]:
    return {"Authorization": f"Bearer {client.app.state.credentials.token.value}"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("below", ["", "/x/y"])
def test_the_path_may_be_there_or_not_and_locations_have_it(
    below: str, client: TestClient, authorized: dict[str, str]
) -> None:
    assert client.get(f"{below}/healthz").status_code == 200
    assert client.get(below + MODELS).status_code == 401
    added = client.post(below + MODELS, json={"hub_id": "org/tiny"}, headers={**authorized, "Idempotency-Key": "one"})
    assert added.headers["location"].startswith(f"/x/y{MODELS}/model_")
    again = client.post(below + MODELS, json={"hub_id": "org/tiny"}, headers={**authorized, "Idempotency-Key": "one"})
    assert again.headers["location"] == added.headers["location"]
    assert client.get(added.headers["location"], headers=authorized).json()["hub_id"] == "org/tiny"
    document = client.get(f"{below}/api/v1/openapi.json", headers=authorized).json()
    assert document["servers"] == [{"url": "/x/y"}]


def test_what_only_begins_like_the_path_is_not_below_it(client: TestClient, authorized: dict[str, str]) -> None:
    assert client.get("/x/yhealthz", headers=authorized).status_code == 404
    assert client.get("/x/y", headers=authorized).status_code == 404
    assert client.get("/x/y/x/y/healthz", headers=authorized).status_code == 404
    assert client.get("/x/y/x/y/healthz").status_code == 401  # and no way around the door


@pytest.mark.parametrize(
    ("origin", "secure"), [("https://lora.example", True), ("http://lora.example", False), (None, False)]
)
def test_a_session_is_secure_where_the_page_was_reached_by_tls(
    origin: str | None, secure: bool, client: TestClient
) -> None:
    token = client.app.state.credentials.token.value  # type: ignore[attr-defined]
    headers = {"Origin": origin} if origin else {}
    answer = client.post("/x/y/api/v1/login", json={"password": token}, headers=headers)
    parts = answer.headers["set-cookie"].split("; ")
    assert ("Secure" in parts, "Path=/x/y" in parts) == (secure, True)


def test_another_host_or_origin_is_refused_below_the_path_too(client: TestClient, authorized: dict[str, str]) -> None:
    for wrong in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.get(f"/x/y{MODELS}", headers={**authorized, **wrong}).status_code == 403
    assert client.get(f"/x/y{MODELS}", headers={**authorized, **PAGE}).status_code == 200


@pytest.mark.parametrize("path", ["x", "/x/", "/", "/a b", "/..//x", "https://x", "/x?y"])
def test_what_is_no_root_path_is_refused(path: str) -> None:
    with pytest.raises(InvalidSpec, match="a root path is like /x or /x/y"):
        ServerSettings(root_path=path)
