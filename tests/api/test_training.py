"""Jobs over REST: what one route changes another one, the row or the folder shows."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.testclient import TestClient

from lorasmith.api import jobs
from lorasmith.files import folder_size_bytes, read_json, staged_folder
from lorasmith.jobs.folder import EVENTS, LOG, ORDER
from lorasmith.schemas.data import Dataset
from lorasmith.schemas.jobs import Job, JobStatus
from lorasmith.services.workbench import Workbench
from tests.api.conftest import V1

Makes = Callable[..., dict[str, Any]]


@pytest.fixture
def queue(client: TestClient, add_dataset: Callable[..., Dataset]) -> Makes:
    """Queue a run over REST; keyword arguments go into the request."""
    dataset = add_dataset()

    def make(**fields: Any) -> dict[str, Any]:
        answer = client.post(f"{V1}/jobs", json={"base_model": "starter", "dataset_id": dataset.id, **fields})
        assert answer.status_code == 202, answer.text
        assert answer.headers["location"] == f"{V1}/jobs/{answer.json()['id']}"
        made: dict[str, Any] = answer.json()
        return made

    return make


def set_status(workbench: Workbench, job_id: str, status: JobStatus) -> None:
    def change(row: Job) -> None:
        row.status = status

    workbench.jobs.change(job_id, change)


def test_a_run_is_queued_with_the_seeds_fields(client: TestClient, workbench: Workbench, queue: Makes) -> None:
    made = queue(
        name="mine",
        description="for support",
        preset="quick",
        lora_config={"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"]},
        training_config={"num_train_epochs": 2, "per_device_train_batch_size": 2},
        qlora_config={"enabled": True, "bits": 4, "quant_type": "fp4", "compute_dtype": "float32"},
        priority=3,
        cores=1,
    )
    order = read_json(workbench.path(workbench.jobs.require(made["id"]).folder) / ORDER)
    assert order["spec"]["lora"]["rank"] == made["lora_config"]["rank"] == 4
    assert order["spec"]["training"]["num_epochs"] == 2
    assert order["spec"]["training"]["quantization"] == "fp4"
    assert made["qlora_config"]["enabled"] is True
    assert (made["status"], made["priority"], made["cores"], made["progress"]) == ("queued", 3, 1, 0.0)
    assert client.get(f"{V1}/jobs/{made['id']}").json() == made


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"base_model": "/etc"}, 404, "no model '/etc'"),
        ({"base_model": "../x"}, 404, "no model '../x'"),
        ({"base_model": "startr"}, 404, "did you mean 'starter'?"),
        ({"dataset_id": "/etc/passwd"}, 404, "no dataset"),
        ({"preset": "nope"}, 422, "no preset 'nope'"),
        ({"lora_config": {"rnk": 3}}, 422, "rnk"),
        ({"training_config": {"learning_rate": -1}}, 422, "learning_rate"),
        ({"qlora_config": {"bits": 3}}, 422, "/qlora_config/bits"),
        ({"trust_remote_code": True}, 422, "/trust_remote_code"),
        ({"training_config": {"trust_remote_code": True}}, 422, "trust_remote_code"),
    ],
)
def test_what_cannot_run_is_refused_before_there_is_a_job(
    client: TestClient, workbench: Workbench, queue: Makes, fields: dict[str, Any], status: int, text: str
) -> None:
    request = {"base_model": "starter", "dataset_id": "sums", **fields}
    answer = client.post(f"{V1}/jobs", json=request)
    assert (answer.status_code, workbench.jobs.list()) == (status, [])
    assert text in answer.json()["detail"]


def test_two_runs_do_not_claim_one_name(client: TestClient, queue: Makes) -> None:
    queue(name="mine")
    answer = client.post(f"{V1}/jobs", json={"base_model": "starter", "dataset_id": "sums", "name": "mine"})
    assert answer.status_code == 409
    assert answer.json()["detail"] == "there is already an adapter or a run named 'mine'"


def test_pages_and_filters(client: TestClient, workbench: Workbench, queue: Makes) -> None:
    ids = [queue()["id"] for _ in range(3)]
    set_status(workbench, ids[1], JobStatus.FAILED)
    page = client.get(f"{V1}/jobs", params={"limit": 2}).json()
    assert [one["id"] for one in page["data"]] == [ids[2], ids[1]]
    rest = client.get(f"{V1}/jobs", params={"limit": 2, "cursor": page["next_cursor"]}).json()
    assert ([one["id"] for one in rest["data"]], rest["next_cursor"]) == ([ids[0]], None)
    failed = client.get(f"{V1}/jobs", params={"status": ["failed", "paused"]}).json()
    assert [one["id"] for one in failed["data"]] == [ids[1]]
    assert client.get(f"{V1}/jobs", params={"kind": "export"}).json()["data"] == []


def test_what_waits_is_paused_resumed_and_cancelled(client: TestClient, queue: Makes) -> None:
    path = f"{V1}/jobs/{queue()['id']}"

    def status() -> str:
        found: str = client.get(path).json()["status"]
        return found

    assert client.post(f"{path}/checkpoint").status_code == 409
    for _ in range(2):
        assert client.post(f"{path}/pause").status_code == 202
        assert status() == "paused"
    assert client.post(f"{path}/resume").status_code == 202
    assert status() == "queued"
    assert client.post(f"{path}/resume").status_code == 409
    for _ in range(2):
        assert client.delete(path).status_code == 202
        assert status() == "cancelled"


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.COMPLETED])
def test_what_has_ended_is_not_cancelled(
    client: TestClient, workbench: Workbench, queue: Makes, status: JobStatus
) -> None:
    path = f"{V1}/jobs/{queue()['id']}"
    set_status(workbench, path.rpartition("/")[2], status)
    before = client.get(path).json()
    answer = client.delete(path)
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert f"is {status}, so it cannot cancel" in answer.json()["detail"]
    assert client.get(path).json() == before


def test_a_copy_has_its_own_fields_and_name(client: TestClient, queue: Makes) -> None:
    made = queue(name="mine", lora_config={"rank": 4})
    answer = client.post(f"{V1}/jobs/{made['id']}/clone", json={"lora_config": {"r": 8}, "priority": 1})
    copy = client.get(answer.headers["location"]).json()
    assert answer.status_code == 202
    assert (copy["lora_config"]["rank"], copy["priority"]) == (8, 1)
    assert copy["name"] not in ("mine", made["id"])
    assert copy["training_config"] == made["training_config"]


@pytest.fixture
def running(workbench: Workbench, queue: Makes) -> Job:
    """A job in training whose engine has written 40 steps and three lines of log."""
    job = workbench.jobs.require(queue()["id"])
    set_status(workbench, job.id, JobStatus.TRAINING)
    folder = workbench.path(job.folder)
    write_steps(folder, 1, 40)
    (folder / LOG).write_text("one\ntwo\nthree\n", encoding="utf-8")
    return job


def write_steps(folder: Path, first: int, last: int) -> None:
    with (folder / EVENTS).open("a", encoding="utf-8") as file:
        for seq in range(first, last + 1):
            data = {"step": seq, "total_steps": 80, "loss": 1 / seq, "tokens_per_s": 10.0, "eta_s": 1.0}
            line = {"seq": seq, "time": "2026-01-01T00:00:00Z", "type": "step", "data": data}
            file.write(json.dumps(line) + "\n")


def test_metrics_and_logs_in_pages(client: TestClient, running: Job) -> None:
    path = f"{V1}/jobs/{running.id}"
    shown = client.get(path).json()
    assert (shown["progress"], shown["current_step"], shown["current_loss"]) == (50.0, 40, 1 / 40)
    points, cursor = [], 0
    while cursor is not None:
        page = client.get(f"{path}/metrics", params={"limit": 15, "cursor": cursor}).json()
        points += page["data"]
        cursor = page["next_cursor"]
    assert [point["seq"] for point in points] == list(range(1, 41))
    first = client.get(f"{path}/logs", params={"limit": 2}).json()
    rest = client.get(f"{path}/logs", params={"cursor": first["next_cursor"]}).json()
    assert [line["text"] for line in first["data"] + rest["data"]] == ["one", "two", "three"]


def test_a_checkpoint_that_the_engine_removes_meanwhile_is_left_out(
    client: TestClient, workbench: Workbench, running: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [workbench.path(running.folder) / "checkpoints" / f"step-{step:06d}" for step in (2, 4)]
    for folder in kept:
        with staged_folder(folder) as staging:
            (staging / "state").write_bytes(bytes(1000))

    def size_bytes(folder: Path) -> int:
        if folder == kept[0]:
            shutil.rmtree(folder)
        return folder_size_bytes(folder)

    monkeypatch.setattr(jobs, "folder_size_bytes", size_bytes)
    answer = client.get(f"{V1}/jobs/{running.id}/checkpoints")
    assert [one["step"] for one in answer.json()] == [4], answer.text


@pytest.fixture
def url(app: FastAPI, client: TestClient) -> Iterator[str]:
    """The application behind a real server: a stream needs one that sends while it is written."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def streamed(client: TestClient, url: str, path: str, last_id: str | None = None) -> Iterator[dict[str, str]]:
    """The events of a stream, as field → value."""
    headers = {b"Authorization": client.headers["Authorization"].encode(), b"Accept": b"text/event-stream"}
    headers |= {b"Last-Event-ID": last_id.encode()} if last_id else {}
    with httpx.stream("GET", url + path, headers=headers, timeout=20) as answer:
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
    from lorasmith.services.access import rotate_token

    monkeypatch.setattr("lorasmith.api.streams.RECHECK_S", 0.5)
    events = streamed(client, url, f"{V1}/jobs/{running.id}/events", last_id="39")
    assert [next(events)["event"] for _ in range(2)] == ["status", "step"]
    rotate_token(workbench.home)
    assert [event["event"] for event in events] == []
