"""`lorasmith serve` as a process: what it prints, whom it refuses, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from lorasmith.api.server import check_certificate
from lorasmith.errors import InvalidSpec, NotFound
from lorasmith.settings import ServerSettings

get, post = partial(httpx.get, timeout=60), partial(httpx.post, timeout=60)
Lorasmith = Callable[..., subprocess.CompletedProcess[str]]
Serve = Callable[..., tuple[subprocess.Popen[str], dict[str, Any]]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a server on a free port and wait until it has printed its address; it is ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(
        *arguments: str, port: str | None = "0", **environment: str
    ) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        command = [sys.executable, "-m", "lorasmith", "--home", str(tmp_path / "home"), "serve", "--json", *arguments]
        command += ["--port", port] if port is not None else []
        with (tmp_path / "stderr.txt").open("w") as errors:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment}
            )
        started.append(process)
        assert process.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = process.stdout.readline()
            assert line, (tmp_path / "stderr.txt").read_text()
            text += line
        return process, json.loads(text)

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_server_answers_and_ends_with_status_0_on_sigterm(serve: Serve, lorasmith: Lorasmith) -> None:
    process, said = serve()
    assert get(f"{said['url']}/healthz").json() == {"status": "ok"}
    token = lorasmith("api-token").stdout.strip()
    datasets = f"{said['url']}/api/v1/finetune/datasets"
    assert get(datasets).status_code == 401
    assert get(datasets, headers={"Authorization": f"Bearer {token}"}).json() == {"data": [], "next_cursor": None}
    file = Path(said["token_file"])
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_a_second_server_of_a_home_names_the_first_until_that_is_gone(serve: Serve, lorasmith: Lorasmith) -> None:
    first, said = serve()
    refused = lorasmith("serve", "--port", "0")
    assert refused.returncode == 4
    assert f"process {first.pid}, {said['url']}" in refused.stderr
    first.kill()
    first.wait()
    serve()


def test_without_a_port_the_next_free_one_is_taken_and_said(serve: Serve, lorasmith: Lorasmith) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8420))
            taken.listen()
        except OSError:
            pass  # somebody else has it, which is as good
        refused = lorasmith("serve", "--port", "8420")
        assert (refused.returncode, "port 8420 is taken" in refused.stderr) == (4, True)
        _, said = serve(port=None)
        port = int(said["url"].rpartition(":")[2])
        assert 8420 < port < 8440
        assert get(f"{said['url']}/healthz").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_other_machines_come_in_with_a_password_alone(host: str, lorasmith: Lorasmith) -> None:
    refused = lorasmith("serve", "--host", host)
    assert refused.returncode == 2
    assert f"listening on {host} lets other machines in, which needs a password" in refused.stderr


def test_a_password_comes_from_the_environment_and_not_in_the_arguments(serve: Serve) -> None:
    process, said = serve("--host", "0.0.0.0", LORASMITH_PASSWORD="correct horse")
    url = said["url"].replace("0.0.0.0", "127.0.0.1")
    assert post(f"{url}/api/v1/login", json={"password": "wrong"}).status_code == 401
    assert post(f"{url}/api/v1/login", json={"password": "correct horse"}).status_code == 200
    assert b"correct horse" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()


def test_a_short_password_is_refused(lorasmith: Lorasmith) -> None:
    refused = lorasmith("serve", "--password-stdin", stdin="short\n")
    assert refused.returncode == 2
    assert "the password must have at least 8 characters, got 5" in refused.stderr


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`cert.pem` of localhost, signed by itself, with `key.pem`; `other.pem` and `locked.pem` are keys that do not fit it."""
    folder = tmp_path_factory.mktemp("tls")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    key, other = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(Encoding.PEM))
    locked = BestAvailableEncryption(b"secret")
    for file_name, one, lock in (
        ("key", key, NoEncryption()),
        ("other", other, NoEncryption()),
        ("locked", key, locked),
    ):
        (folder / f"{file_name}.pem").write_bytes(one.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    return folder / "cert.pem"


def test_a_server_speaks_https_below_the_path_of_a_proxy(serve: Serve, certificate: Path, lorasmith: Lorasmith) -> None:
    tls = ("--tls-cert", str(certificate), "--tls-key", str(certificate.with_name("key.pem")))
    process, said = serve("--host", "localhost", "--root-path", "/lora", *tls)
    url = said["url"]
    assert url.startswith("https://localhost:")
    with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=str(certificate)), timeout=60) as client:
        token = lorasmith("api-token").stdout.strip()
        answer = client.post("/lora/api/v1/login", json={"password": token}, headers={"Origin": url})
        assert answer.status_code == 200
        assert {"Secure", "HttpOnly", "Path=/lora"} <= set(answer.headers["set-cookie"].split("; "))
        added = client.post(
            "/lora/api/v1/finetune/models", json={"hub_id": "org/tiny"}, headers={"X-Lorasmith-Request": "1"}
        )
        assert added.status_code == 201
        assert added.headers["location"].startswith("/lora/api/v1/finetune/models/model_")
        assert client.get(added.headers["location"]).json()["hub_id"] == "org/tiny"
        assert client.get("/lora/healthz", headers={"Host": "evil.example"}).status_code == 403
        assert client.get("/lora/healthz", headers={"Origin": "https://evil.example"}).status_code == 403
    with pytest.raises(httpx.ConnectError, match="self-signed certificate"):
        get(f"{url}/healthz")
    with pytest.raises(httpx.RemoteProtocolError):
        get(f"{url.replace('https', 'http')}/healthz")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0


def test_a_certificate_that_cannot_be_used_is_refused(certificate: Path, tmp_path: Path) -> None:
    """Called as the command calls it, without a process for each."""
    key = certificate.with_name("key.pem")
    check_certificate(certificate, key)
    for wrong, message in (("other.pem", "mismatch"), ("locked.pem", "is encrypted"), ("cert.pem", "cannot be used")):
        with pytest.raises(InvalidSpec, match=message):
            check_certificate(certificate, certificate.with_name(wrong))
    with pytest.raises(NotFound, match="no file"):
        check_certificate(certificate, tmp_path / "none.pem")
    with pytest.raises(InvalidSpec, match="TLS needs a certificate and its key"):
        ServerSettings(tls_cert=certificate)


def test_a_rotated_token_is_another(lorasmith: Lorasmith) -> None:
    first = lorasmith("api-token").stdout
    assert lorasmith("api-token").stdout == first
    rotated = json.loads(lorasmith("api-token", "--rotate", "--json").stdout)["token"]
    assert rotated != first.strip()
    assert lorasmith("api-token").stdout.strip() == rotated
