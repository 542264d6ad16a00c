"""Planted values that may stand nowhere: not in answers, logs, rows, job folders, arguments or environments."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from lorasmith.services.secrets import get_secret
from lorasmith.services.workbench import Workbench
from tests.api.conftest import V1, rows

SECRETS = "/api/v1/secrets"
CANARY = "sk-canary-7d41e8b2c0"
Lorasmith = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def no_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHON_KEYRING_BACKEND", "keyring.backends.fail.Keyring")


def test_a_secret_goes_in_and_does_not_come_out(client: TestClient, workbench: Workbench) -> None:
    put = client.put(f"{SECRETS}/openai", json={"value": CANARY})
    assert put.status_code == 200
    listed = client.get(SECRETS)
    assert [one["name"] for one in listed.json()] == ["openai"]
    assert CANARY not in put.text + listed.text
    assert client.get(f"{SECRETS}/openai").status_code == 405
    assert get_secret(workbench.home, "openai") == CANARY
    assert client.delete(f"{SECRETS}/openai").status_code == 204
    assert client.get(SECRETS).json() == []


@pytest.mark.parametrize(
    "body",
    [
        f'{{"value": "{CANARY}", "valu": "{CANARY}"}}',
        f'{{"valu": "{CANARY}"}}',
        f'{{"value": ["{CANARY}"]}}',
        f'{{"value": "{CANARY}"',
        f'"{CANARY}"',
        '{"value": "' + CANARY * 1000 + '"}',
    ],
)
def test_a_wrong_request_is_not_told_its_value_again(
    body: str, client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answer = client.put(f"{SECRETS}/openai", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert CANARY not in answer.text + str(answer.headers) + caplog.text


def test_planted_values_stand_nowhere_but_in_their_places(tmp_path: Path, lorasmith: Lorasmith) -> None:
    """A password, a token and a secret through a real server; then every byte that it left is searched."""
    home, password = tmp_path / "home", "canary-password-55aa"
    stored = lorasmith("secrets", "set", "openai", stdin=f"{CANARY}\n")
    assert stored.returncode == 0, stored.stderr
    token = lorasmith("api-token").stdout.strip()
    command = [
        sys.executable,
        "-m",
        "lorasmith",
        "--debug",
        "--home",
        str(home),
        "serve",
        "--port",
        "0",
        "--password-stdin",
    ]
    log = tmp_path / "log.txt"
    with log.open("w") as errors:
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(f"{password}\n")
        server.stdin.flush()
        url = server.stdout.readline().strip()
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
            answers = [
                client.post("/api/v1/login", json={"password": password}),
                client.post("/api/v1/login", json={"password": f"{password}x"}),
                client.put(f"{SECRETS}/other", json={"value": f"{CANARY}2"}),
                client.get(SECRETS),
                client.post(f"{V1}/datasets", data={"name": "sums"}, files={"file": ("a.jsonl", rows(5))}),
                client.get(f"{V1}/datasets/sums/preview"),
                client.get("/metrics"),
            ]
        running = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        server.send_signal(signal.SIGTERM)
        rest = server.stdout.read()
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.wait()
    said = "".join(answer.text for answer in answers) + rest + log.read_text()
    places = {CANARY: set(), password: set(), token: {home / "server" / "token"}}
    for value, allowed in places.items():
        assert value not in said
        assert value.encode() not in running
        holding = {Path(folder) / name for folder, _, names in os.walk(home) for name in names
                   if value.encode() in (Path(folder) / name).read_bytes()}  # fmt: skip
        assert holding == allowed, value
