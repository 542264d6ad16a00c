"""The life of an adapter over HTTP, with a real server, worker, engines and OpenAI's own client."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from lorasmith.services.access import api_token
from lorasmith.services.jobs import job_events
from lorasmith.services.workbench import Workbench

V1 = "/api/v1/finetune"
Starts = Callable[[], "Server"]


class Server:
    """`lorasmith serve` on a free port."""

    def __init__(self, home: Path) -> None:
        command = [sys.executable, "-m", "lorasmith", "--home", str(home), "serve", "--port", "0", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        described = "".join(iter(self.process.stdout.readline, "}\n")) + "}"
        self.url = json.loads(described)["url"]
        self.token = api_token(home)
        self.client = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}, timeout=60, trust_env=False
        )

    def get(self, path: str) -> Any:
        answer = self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def until(self, path: str, is_there: Callable[[Any], bool], seconds: float = 240) -> Any:
        deadline = time.monotonic() + seconds
        while not is_there(found := self.get(path)):
            assert time.monotonic() < deadline, found
            assert found["status"] not in ("failed", "error", "interrupted"), found
            time.sleep(0.2)
        return found


@pytest.fixture
def start(workbench: Workbench) -> Iterator[Starts]:
    servers: list[Server] = []

    def begin() -> Server:
        servers.append(Server(workbench.home))
        return servers[-1]

    yield begin
    for server in servers:
        server.process.kill()
        server.process.wait()


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "test_data.jsonl"
    lines = ({"instruction": f"Say {n} twice.", "output": f"{n} {n}"} for n in range(40))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def has(status: str) -> Callable[[Any], bool]:
    return lambda found: bool(found["status"] == status)


def test_upload_train_and_export(start: Starts, rows: Path, workbench: Workbench) -> None:
    """The workbench design's end-to-end test, section 11.3."""
    server = start()
    with rows.open("rb") as file:
        sent = server.client.post(
            f"{V1}/datasets", files={"file": file}, data={"name": "test-data", "format": "alpaca"}
        )
    assert sent.status_code == 202, sent.text
    dataset = server.until(sent.headers["location"], has("ready"))
    assert dataset["num_examples"] == 40

    asked = {
        "base_model": "starter",
        "dataset_id": dataset["id"],
        "lora_config": {"rank": 8, "alpha": 16},
        "training_config": {"num_epochs": 1, "max_steps": 3, "log_every": 1},
    }
    job = server.client.post(f"{V1}/jobs", json=asked)
    assert job.status_code == 202, job.text
    trained = server.until(job.headers["location"], has("completed"))
    assert (trained["progress"], trained["current_step"]) == (100.0, 3)
    points = server.get(f"{job.headers['location']}/metrics")["data"]
    assert [point["data"]["step"] for point in points if point["type"] == "step"] == [1, 2, 3]
    assert server.get(f"{job.headers['location']}/checkpoints")[-1]["step"] == 3

    adapter = server.get(f"{V1}/adapters/{trained['adapter_id']}")
    assert (adapter["training_job_id"], adapter["lora_config"]["rank"]) == (trained["id"], 8)
    assert (workbench.home / adapter["file_path"] / "adapter_model.safetensors").is_file()

    export = server.client.post(f"{V1}/adapters/{adapter['id']}/export", json={"quantization": "q8_0"})
    assert export.status_code == 202, export.text
    written = server.until(export.headers["location"], has("completed"))
    assert (workbench.home / written["file_path"]).is_file()
    assert server.client.get(f"{export.headers['location']}/file").content[:4] == b"GGUF"
    assert server.get(f"{V1}/adapters/{adapter['id']}")["gguf_path"] == written["file_path"]


def test_the_openai_client_trains_and_does_not_notice_that_the_server_was_killed(
    start: Starts, rows: Path, workbench: Workbench
) -> None:
    server = start()
    with OpenAI(base_url=f"{server.url}/v1", api_key=server.token) as client:
        file = client.files.create(file=rows, purpose="fine-tune")
        hyperparameters: Any = {"n_epochs": 30, "batch_size": 4}
        method: Any = {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}
        job = client.fine_tuning.jobs.create(model="starter", training_file=file.id, suffix="twice", method=method)
        own_id = job.id.replace("ftjob-", "job_")
        running = server.until(f"{V1}/jobs/{own_id}", lambda found: bool(found["current_step"] >= 10))
    stored = workbench.jobs.require(own_id)
    assert stored.pid is not None
    os.kill(stored.pid, signal.SIGSTOP)  # a fast one would be done before the next server is there
    server.process.kill()
    server.process.wait()

    server = start()
    after = server.get(f"{V1}/jobs/{own_id}")
    assert (after["status"], after["started_at"]) == ("training", running["started_at"])
    with OpenAI(base_url=f"{server.url}/v1", api_key=server.token) as client:
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
        os.kill(stored.pid, signal.SIGCONT)
        server.until(f"{V1}/jobs/{own_id}", has("completed"))
        (began,) = job_events(workbench, stored, type="started")
        assert began.data["pid"] == stored.pid, "the engine went on"
        done = client.fine_tuning.jobs.retrieve(job.id)
        assert done.status == "succeeded"
        assert done.fine_tuned_model is not None
        assert done.fine_tuned_model.startswith("ft:starter:lorasmith:twice:")
        messages = [event.message for event in client.fine_tuning.jobs.list_events(job.id)]
        assert messages[0] == "The job has ended: completed"
        checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[0]
        assert (checkpoint.step_number, checkpoint.fine_tuning_job_id) == (300, job.id)
    events = [json.loads(line) for line in (workbench.path(f"jobs/{own_id}") / "events.jsonl").open(encoding="utf-8")]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert sum(event["type"] == "started" for event in events) == 1
