"""Jobs over REST: what one route changes another one, the row or the folder shows."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from lorasmith.api import jobs
from lorasmith.files import folder_size_bytes, read_json, staged_folder
from lorasmith.jobs.folder import ORDER
from lorasmith.schemas.jobs import Job, JobStatus
from lorasmith.services import training
from lorasmith.services.jobs import create_job
from lorasmith.services.workbench import Workbench
from tests.api.conftest import V1, Makes, set_status


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


def test_runs_that_are_queued_at_once_get_names_of_their_own(
    client: TestClient, queue: Makes, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_names = training.taken_names

    def slowly(workbench: Workbench) -> set[str]:
        found = taken_names(workbench)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(training, "taken_names", slowly)
    with ThreadPoolExecutor() as pool:
        made = list(pool.map(lambda _: queue()["name"], range(3)))
    assert len(set(made)) == 3


def test_a_dataset_is_not_removed_between_the_start_of_a_run_and_its_row(
    client: TestClient, workbench: Workbench, queue: Makes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ThreadPoolExecutor() as pool:
        removed: list[Future[int]] = []

        def remove_meanwhile(*given: Any, **facts: Any) -> Job:
            url = f"{V1}/datasets/sums"
            removed.append(pool.submit(lambda: client.delete(url, params={"force": "true"}).status_code))
            time.sleep(0.2)  # until it waits
            return create_job(*given, **facts)

        monkeypatch.setattr(training, "create_job", remove_meanwhile)
        queue()
        assert removed[0].result() == 409
