"""Streams of jobs over real connections: what they replay, follow and leave, and how they end."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from lorasmith.api import event_streams, feeds
from lorasmith.api.server import Server
from lorasmith.jobs.folder import LOG
from lorasmith.schemas.jobs import Job, JobStatus
from lorasmith.services.access import rotate_token
from lorasmith.services.workbench import Workbench
from tests.api.conftest import BASE, V1, Makes, set_status, write_steps
from tests.waiting import until


class InThread(Server):
    capture_signals = uvicorn.Server.capture_signals


@pytest.fixture
def stranger(app: FastAPI) -> TestClient:
    """Its requests alone: the background work runs in the server, and two of it would share the streams between threads."""
    return TestClient(app, base_url=BASE, raise_server_exceptions=False)


@pytest.fixture
def server(app: FastAPI, client: TestClient) -> Iterator[Server]:
    """The application behind a real server: a stream needs one that sends while it is written."""
    server = InThread(uvicorn.Config(app, port=0, log_level="warning"), app.state.streams)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield server
    server.should_exit = True
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture
def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def streamed(client: TestClient, url: str, path: str, last_id: str | None = None) -> Iterator[dict[str, str]]:
    """The events of a stream, as field → value."""
    headers = {b"Authorization": client.headers["Authorization"].encode(), b"Accept": b"text/event-stream"}
    headers |= {b"Last-Event-ID": last_id.encode()} if last_id else {}
    with httpx.stream("GET", url + path, headers=headers, timeout=60) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event: dict[str, str] = {}
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if line and name:
                event[name] = value
            elif event:
                yield event
                event = {}


def test_a_stream_replays_follows_and_ends_with_the_job(
    client: TestClient, url: str, workbench: Workbench, running: Job
) -> None:
    folder = workbench.path(running.folder)
    events = streamed(client, url, f"{V1}/jobs/{running.id}/metrics", last_id="38")
    first = next(events)
    assert first["event"] == "status", first
    assert json.loads(first["data"])["status"] == "training"
    assert [next(events)["id"] for _ in range(2)] == ["39", "40"]
    write_steps(folder, 41, 42)
    assert [next(events)["id"] for _ in range(2)] == ["41", "42"]
    write_steps(folder, 43, 43)
    set_status(workbench, running.id, JobStatus.COMPLETED)
    rest = list(events)
    assert [event.get("id") for event in rest if event["event"] == "step"] == ["43"]
    assert json.loads(rest[-2]["data"])["status"] == "completed"
    assert rest[-1]["event"] == "end"


@pytest.mark.parametrize("last_id", ["41", "99999999", "-1", "x" * 40, "1e3", "９"])
def test_an_id_that_was_never_sent_starts_again(client: TestClient, url: str, running: Job, last_id: str) -> None:
    events = streamed(client, url, f"{V1}/jobs/{running.id}/events", last_id=last_id)
    assert next(events)["event"] == "reset"
    assert next(events)["event"] == "status"
    assert next(events)["id"] == "1"


def test_logs_are_followed_by_the_byte(client: TestClient, url: str, workbench: Workbench, running: Job) -> None:
    events = streamed(client, url, f"{V1}/jobs/{running.id}/logs", last_id="4")
    assert [json.loads(next(events)["data"])["text"] for _ in range(2)] == ["two", "three"]
    with (workbench.path(running.folder) / LOG).open("a", encoding="utf-8") as log:
        log.write("four\n")
    assert json.loads(next(events)["data"]) == {"offset": 19, "text": "four"}


def test_one_stream_has_all_jobs_and_goes_on_where_it_was(
    client: TestClient, url: str, workbench: Workbench, running: Job, queue: Makes
) -> None:
    events = streamed(client, url, f"{V1}/events")
    assert json.loads(next(events)["data"])["job_id"] == running.id
    waiting = queue()["id"]
    status = json.loads(next(events)["data"])
    assert (status["job_id"], status["status"]) == (waiting, "queued")
    write_steps(workbench.path(running.folder), 41, 42)
    step = next(events)
    assert json.loads(step["data"])["job_id"] == running.id
    events.close()  # type: ignore[attr-defined]
    again = streamed(client, url, f"{V1}/events", last_id=step["id"])
    seen = [next(again) for _ in range(3)]
    assert [event["id"].count(f"{running.id}:42") for event in seen if event["event"] == "step"] == [1]
    set_status(workbench, running.id, JobStatus.FAILED)
    assert json.loads(next(again)["data"])["status"] == "failed"


def test_a_stream_ends_when_its_token_does(
    client: TestClient, url: str, running: Job, workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_streams, "RECHECK_S", 0.5)
    monkeypatch.setattr(feeds, "WAKE_S", 0.2)
    events = streamed(client, url, f"{V1}/jobs/{running.id}/events", last_id="39")
    assert [next(events)["event"] for _ in range(2)] == ["status", "step"]
    rotate_token(workbench.home)
    assert [event["event"] for event in events] == []


def test_a_silent_stream_has_heartbeats(
    client: TestClient, url: str, running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_streams, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(feeds, "WAKE_S", 0.2)
    headers = {"Authorization": client.headers["Authorization"], "Accept": "text/event-stream", "Last-Event-ID": "40"}
    with httpx.stream("GET", f"{url}{V1}/jobs/{running.id}/metrics", headers=headers, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        assert [next(lines).partition(":")[0] for _ in range(4)] == ["event", "data", "", ""]


def test_a_reader_that_takes_nothing_is_left(
    app: FastAPI, client: TestClient, url: str, workbench: Workbench, running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_streams, "SEND_TIMEOUT_S", 0.5)
    write_steps(workbench.path(running.folder), 41, 60_000)  # more than the buffers of two sockets hold
    host, port = url.removeprefix("http://").split(":")
    asked = f"GET {V1}/jobs/{running.id}/metrics HTTP/1.1\r\nHost: {host}\r\nAccept: text/event-stream\r\n"
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((host, int(port)))
        deaf.sendall(f"{asked}Authorization: {client.headers['Authorization']}\r\n\r\n".encode())
        until(lambda: app.state.streams.open)
        events = streamed(client, url, f"{V1}/jobs/{running.id}/metrics", last_id="59999")
        assert [next(events).get("id") for _ in range(2)] == [None, "60000"]
        until(lambda: len(app.state.streams.open) == 1)
        write_steps(workbench.path(running.folder), 60_001, 60_001)
        assert next(events)["id"] == "60001"


def test_streams_end_in_order_when_the_server_does(client: TestClient, server: Server, url: str, running: Job) -> None:
    events = streamed(client, url, f"{V1}/jobs/{running.id}/metrics", last_id="40")
    assert next(events)["event"] == "status"
    server.should_exit = True
    assert list(events) == []  # httpx raises for an answer that is cut off


def test_an_error_ends_a_stream_and_is_the_servers(
    app: FastAPI, client: TestClient, url: str, workbench: Workbench, running: Job, caplog: pytest.LogCaptureFixture
) -> None:
    events = streamed(client, url, f"{V1}/jobs/{running.id}/metrics", last_id="40")
    assert next(events)["event"] == "status"
    with (workbench.path(running.folder) / LOG).open("a", encoding="utf-8") as log:
        log.write("five\n")
    feed = app.state.feeds.followed[running.id]
    feed.kept, feed.events_file = (10**9, []), workbench.home  # no file
    write_steps(workbench.path(running.folder), 41, 41)
    with pytest.raises(httpx.RemoteProtocolError, match="closed"):
        list(events)
    assert "IsADirectoryError" in caplog.text
    until(lambda: not app.state.streams.open and not app.state.feeds.followed)
