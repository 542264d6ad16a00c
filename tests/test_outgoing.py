"""Requests go to the address that was checked, and to their endpoint alone."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from lorasmith.endpoints import Endpoint, parse_endpoint
from lorasmith.errors import InvalidSpec
from lorasmith.outgoing import CheckedTransport, outgoing_client
from lorasmith.schemas.teachers import Reach
from tests.teacher_stub import Reply, Stub, completion, serving

LOCAL = Reach(loopback=True)
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": '{"text": "t"}'}]


async def status_of(transport: CheckedTransport, url: str) -> int:
    async with outgoing_client(transport, timeout_s=60) as client:
        body = {"model": "m", "messages": MESSAGES}
        return (await client.post(f"{url}/chat/completions", json=body)).status_code


def test_a_name_that_changes_its_answer_gains_nothing() -> None:
    """The first answer is checked and connected to; the second, asked for after the server has gone, is checked too."""
    answers = iter([["127.0.0.1"], ["169.254.169.254"]])

    async def resolve(host: str, port: int) -> list[str]:
        return next(answers)

    async def scenario(port: int) -> None:
        transport = CheckedTransport(
            parse_endpoint(f"http://teacher.test:{port}/v1"), LOCAL, connections=1, resolve=resolve
        )
        url = f"http://teacher.test:{port}/v1"
        async with outgoing_client(transport, timeout_s=60) as client:
            body = {"model": "m", "messages": [{"role": "system", "content": "exactly 1 string"}, MESSAGES[1]]}
            for _ in range(2):  # one resolution serves both
                assert (await client.post(f"{url}/chat/completions", json=body)).status_code == 200
            transport.addresses = []  # as after a connection that failed
            with pytest.raises(InvalidSpec, match="169.254.169.254"):
                await client.post(f"{url}/chat/completions", json=body)

    with serving(Stub(rule=lambda request, before: Reply(body=completion({"texts": ["t"]})))) as stub:
        asyncio.run(scenario(stub.port))
        assert len(stub.requests) == 2


def test_a_host_with_a_dead_address_is_reached_at_its_other_one() -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.2", "127.0.0.1"]  # the server listens on the second alone

    with serving(Stub(rule=lambda request, before: Reply(body=completion("x")))) as stub:
        url = f"http://teacher.test:{stub.port}/v1"
        transport = CheckedTransport(parse_endpoint(url), LOCAL, connections=1, resolve=resolve)
        assert asyncio.run(status_of(transport, url)) == 200
        assert transport.addresses[0] == "127.0.0.1"


def test_a_transport_carries_requests_to_its_own_endpoint_alone() -> None:
    transport = CheckedTransport(parse_endpoint("http://127.0.0.1:9/v1"), LOCAL, connections=1)
    with pytest.raises(InvalidSpec, match="is not one for the endpoint"):
        asyncio.run(status_of(transport, "http://127.0.0.1:10/v1"))


def test_redirects_are_not_followed() -> None:
    moved = Reply(307, headers={"location": "http://169.254.169.254/latest/meta-data"})
    with serving(Stub(rule=lambda request, before: moved)) as stub:
        transport = CheckedTransport(parse_endpoint(stub.url), LOCAL, connections=1)
        assert asyncio.run(status_of(transport, stub.url)) == 307


class Hello(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_tls_asks_for_the_name_though_the_connection_goes_to_an_address(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    names = ["-subj", "/CN=teacher.test", "-addext", "subjectAltName=DNS:teacher.test"]
    files = ["-keyout", str(key), "-out", str(certificate), "-days", "2"]
    subprocess.run([*command, *names, *files], check=True, capture_output=True)
    server = HTTPServer(("127.0.0.1", 0), Hello)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    def status(host: str) -> int:
        trusted = ssl.create_default_context(cafile=str(certificate))
        endpoint = Endpoint("https", host, server.server_address[1], "/v1")
        transport = CheckedTransport(endpoint, LOCAL, connections=1, resolve=resolve, tls=trusted)
        return asyncio.run(status_of(transport, endpoint.url))

    try:
        assert status("teacher.test") == 200
        with pytest.raises(httpx.ConnectError, match="not valid for 'other.test'"):
            status("other.test")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
