"""Who may call what. The matrix comes from the OpenAPI document, so that a new route is in it from its first day."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from lorasmith.api import credentials
from lorasmith.api.credentials import CHANGE_HEADER, SESSION_COOKIE
from lorasmith.api.security import PUBLIC
from lorasmith.services import access
from lorasmith.services.access import api_token, rotate_token, write_private
from lorasmith.settings import ServerSettings
from tests.api.conftest import BASE, V1

PASSWORD = "correct horse battery"
TOKEN = object()  # stands for the right one
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
SITE = {"Authorization": TOKEN}
BAD_CALLERS: dict[str, tuple[int, dict[str, Any]]] = {
    "no token": (401, {}),
    "wrong token": (401, {"Authorization": "Bearer lorasmith_wrong"}),
    "empty token": (401, {"Authorization": "Bearer "}),
    "the token as basic": (401, {"Authorization": "Basic dXNlcjpwYXNz"}),
    "the token in X-Api-Key": (401, {"X-Api-Key": TOKEN}),
    "the token as a cookie": (401, {"Cookie": TOKEN}),
    "an evil host": (403, {**SITE, "Host": "evil.example"}),
    "a host that begins like ours": (403, {**SITE, "Host": "127.0.0.1.evil.example"}),
    "a host with a user": (403, {**SITE, "Host": "127.0.0.1@evil.example"}),
    "an empty host": (403, {**SITE, "Host": ""}),
    "an evil origin": (403, {**SITE, "Origin": "https://evil.example"}),
    "an origin that begins like ours": (403, {**SITE, "Origin": "http://127.0.0.1:8420.evil.example"}),
    "our address on another port": (403, {**SITE, "Origin": "http://127.0.0.1:9999"}),
    "the origin null": (403, {**SITE, "Origin": "null"}),
    "an empty origin": (403, {**SITE, "Origin": ""}),
    "a page of another site": (403, {**SITE, "Sec-Fetch-Site": "cross-site"}),
    "a page of a sister site": (403, {**SITE, "Sec-Fetch-Site": "same-site"}),
}


@pytest.fixture
def settings() -> ServerSettings:
    """With a password, whose hash takes a quarter of a second."""
    return ServerSettings(password=PASSWORD, max_body_bytes=100_000, max_upload_bytes=1_000_000)


def operations(app: FastAPI) -> Iterator[tuple[str, str]]:
    for path in app.openapi()["paths"]:
        for method in METHODS:
            yield method, path.replace("{", "").replace("}", "")


def with_token(headers: dict[str, Any], app: FastAPI) -> dict[str, str]:
    token = app.state.credentials.token.value
    forms = {"Authorization": f"Bearer {token}", "Cookie": f"{SESSION_COOKIE}={token}; token={token}"}
    return {name: forms.get(name, token) if value is TOKEN else value for name, value in headers.items()}


def ask_all(app: FastAPI, requests: list[tuple[str, str, dict[str, Any]]]) -> list[httpx.Response]:
    """All requests over one connection to the application, without a thread for each."""

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            return [await client.request(method, path, **more) for method, path, more in requests]

    return asyncio.run(ask())


@pytest.mark.parametrize("who", BAD_CALLERS)
def test_every_route_refuses(who: str, app: FastAPI) -> None:
    app.state.door_attempts.most = 10**9  # that there are many is tested below
    status, headers = BAD_CALLERS[who]
    beside = [("GET", "/"), ("GET", "/nowhere"), ("GET", "/healthz/"), ("POST", "//healthz")]
    asked = [one for one in [*operations(app), *beside] if status != 401 or one not in PUBLIC]
    sent = with_token(headers, app)
    answers = ask_all(app, [(method, path, {"headers": sent}) for method, path in asked])
    wrong = [
        (*one, answer.status_code) for one, answer in zip(asked, answers, strict=True) if answer.status_code != status
    ]
    assert wrong == []
    assert not any("lorasmith_wrong" in answer.text for answer in answers)


def test_a_token_in_the_query_is_none(app: FastAPI) -> None:
    token = app.state.credentials.token.value
    query = {"params": {"token": token, "access_token": token, "api_key": token}}
    asked = [one for one in operations(app) if one not in PUBLIC]
    answers = ask_all(app, [(method, path, query) for method, path in asked])
    assert [one for one, answer in zip(asked, answers, strict=True) if answer.status_code != 401] == []


def test_two_authorization_headers_are_none(app: FastAPI, stranger: TestClient) -> None:
    good = f"Bearer {app.state.credentials.token.value}"
    answer = stranger.get(f"{V1}/datasets", headers=[("Authorization", good), ("Authorization", "Bearer x")])
    assert answer.status_code == 401


def test_exactly_these_need_no_token(stranger: TestClient, app: FastAPI) -> None:
    asked = list(operations(app))
    answers = ask_all(app, [(method, path, {}) for method, path in asked])
    open_to_all = {one for one, answer in zip(asked, answers, strict=True) if answer.status_code != 401}
    assert open_to_all == {("GET", "/healthz"), ("GET", "/readyz"), ("POST", "/api/v1/login")} == PUBLIC
    assert stranger.get("/healthz").json() == {"status": "ok"}
    assert stranger.get("/readyz").json() == {"status": "ready", "checks": {"database": "ok", "disk": "ok"}}


def test_what_the_document_calls_public_is_what_the_door_lets_through(app: FastAPI) -> None:
    document = app.openapi()
    described = {
        (method.upper(), path)
        for path, found in document["paths"].items()
        for method, operation in found.items()
        if operation.get("security") == []
    }
    assert described == PUBLIC


@pytest.mark.parametrize("headers", [{}, {"Origin": "https://evil.example"}, {"Host": "evil.example"}])
def test_a_web_socket_is_refused_before_its_upgrade(
    headers: dict[str, str], app: FastAPI, stranger: TestClient
) -> None:
    if headers:
        headers = {**headers, "Authorization": f"Bearer {app.state.credentials.token.value}"}
    with pytest.raises(WebSocketDisconnect) as refused, stranger.websocket_connect("/anything", headers=headers):
        pass
    assert refused.value.code == 1008


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:1", "localhost:8420", "LOCALHOST", "[::1]:8420"])
def test_the_host_may_have_any_port(host: str, client: TestClient) -> None:
    assert client.get(f"{V1}/datasets", headers={"Host": host}).status_code == 200


def test_our_own_page_may_call(client: TestClient) -> None:
    own = {"Origin": BASE, "Sec-Fetch-Site": "same-origin"}
    assert client.get(f"{V1}/datasets", headers=own).status_code == 200


def log_in(client: TestClient, word: str) -> Any:
    return client.post("/api/v1/login", json={"password": word})


def test_a_login_reads_with_its_cookie_and_changes_with_the_header(app: FastAPI, stranger: TestClient) -> None:
    answer = log_in(stranger, PASSWORD)
    assert answer.status_code == 200
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert stranger.get("/api/v1/session").json() == {"authenticated_by": "session"}
    assert stranger.post("/api/v1/logout").status_code == 401, "a form of another page cannot send the header"
    assert stranger.get(f"{V1}/datasets", headers={"Authorization": "Bearer x"}).status_code == 401
    held = dict(stranger.cookies)
    assert stranger.post("/api/v1/logout", headers={CHANGE_HEADER: "1"}).status_code == 204
    stranger.cookies.update(held)
    assert stranger.get("/api/v1/session").status_code == 401


def test_the_token_logs_in_too(app: FastAPI, stranger: TestClient) -> None:
    assert log_in(stranger, app.state.credentials.token.value).status_code == 200


def test_a_session_ends_after_its_time(app: FastAPI, stranger: TestClient) -> None:
    log_in(stranger, PASSWORD)
    app.state.credentials.sessions.clock = lambda: 10**12
    assert stranger.get("/api/v1/session").status_code == 401


def test_guessing_the_password_ends_with_a_wait_even_for_the_right_one(app: FastAPI, stranger: TestClient) -> None:
    answers = [log_in(stranger, "wrong").status_code for _ in range(10)]
    assert answers == [401] * 10
    waiting = log_in(stranger, PASSWORD)
    assert waiting.status_code == 429
    assert waiting.json()["code"] == "too_many_attempts"
    assert 0 < int(waiting.headers["retry-after"]) <= 301
    clock = app.state.logins.clock
    app.state.logins.clock = lambda: clock() + 301
    assert log_in(stranger, PASSWORD).status_code == 200


def test_guessing_a_token_is_limited_and_the_right_one_still_works(app: FastAPI, stranger: TestClient) -> None:
    statuses = [stranger.get(f"{V1}/datasets", headers={"Authorization": "Bearer x"}).status_code for _ in range(25)]
    assert statuses == [401] * 20 + [429] * 5
    good = {"Authorization": f"Bearer {app.state.credentials.token.value}"}
    assert stranger.get(f"{V1}/datasets", headers=good).status_code == 200


def test_who_first_asks_for_the_token_at_once_gets_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(path: Path, data: bytes) -> None:
        time.sleep(0.1)
        write_private(path, data)

    monkeypatch.setattr(access, "write_private", slowly)
    with ThreadPoolExecutor() as pool:
        assert len(set(pool.map(api_token, [tmp_path] * 4))) == 1


def test_a_token_that_is_replaced_while_a_server_begins_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api_token(tmp_path)
    new: list[str] = []

    def replaced_then(home: Path) -> str:
        value = api_token(home)
        new.append(rotate_token(home))
        return value

    with monkeypatch.context() as patched:
        patched.setattr(credentials, "api_token", replaced_then)
        token = credentials.Token(tmp_path)
    assert token.matches(new[0])


def test_a_new_token_ends_the_old_one_at_once(app: FastAPI, client: TestClient) -> None:
    new = rotate_token(app.state.workbench.home)
    assert client.get(f"{V1}/datasets").status_code == 401
    assert client.get(f"{V1}/datasets", headers={"Authorization": f"Bearer {new}"}).status_code == 200


def test_every_answer_carries_the_headers_for_browsers(app: FastAPI, client: TestClient) -> None:
    for path in ("/healthz", "/nowhere", f"{V1}/datasets"):
        headers = client.get(path).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "access-control-allow-origin" not in headers


def test_a_body_over_the_limit_is_refused_announced_or_not(client: TestClient) -> None:
    announced = client.put(f"{V1}/datasets/x", content=b"x" * 100_001, headers={"Content-Type": "application/json"})
    assert announced.status_code == 413
    assert announced.json()["detail"] == "the body has 100001 bytes, and this takes at most 100000"
    chunked = client.put(
        f"{V1}/datasets/x", content=(b"x" * 1000 for _ in range(101)), headers={"Content-Type": "application/json"}
    )
    assert chunked.status_code == 413
    assert chunked.json()["code"] == "too_large"
