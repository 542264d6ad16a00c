"""Adapters and what is exported of them, on an adapter that was really trained, for two steps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lorasmith.files import read_json
from lorasmith.schemas.adapters import Adapter
from lorasmith.schemas.jobs import JobStatus
from lorasmith.services.jobs import run_in_foreground
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from tests.api.conftest import V1, rows

ADAPTERS, EXPORTS = f"{V1}/adapters", f"{V1}/exports"


@pytest.fixture(scope="module")
def trained_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (folder / "sums.jsonl").write_text(rows(20))
    command = [sys.executable, "-m", "lorasmith", "--home", str(folder / "home"), "train", "--model", "starter"]
    command += [
        "--data",
        str(folder / "sums.jsonl"),
        "--preset",
        "tiny",
        "--name",
        "sums",
        "--set",
        "training.max_steps=2",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    return folder / "home"


@pytest.fixture
def workbench(trained_home: Path, tmp_path: Path) -> Workbench:
    shutil.copytree(trained_home, tmp_path / "home")
    return Workbench.open(Settings(home=tmp_path / "home"))


@pytest.fixture
def adapter(workbench: Workbench) -> Adapter:
    return workbench.adapters.require("sums")


def test_an_adapter_has_the_fields_of_the_design(client: TestClient, adapter: Adapter, workbench: Workbench) -> None:
    answer = client.get(f"{ADAPTERS}/sums")
    found = answer.json()
    assert found["id"] == adapter.id
    assert (found["base_model"], found["training_job_id"]) == ("starter", adapter.training_job_id)
    assert found["file_path"] == f"adapters/{adapter.id}"
    assert found["file_size"] == sum(path.stat().st_size for path in workbench.path(adapter.folder).iterdir())
    config = read_json(workbench.path(adapter.folder) / "adapter_config.json")
    assert found["lora_config"]["target_modules"] == sorted(config["target_modules"])
    assert (found["lora_config"]["rank"], found["is_merged"], found["gguf_path"]) == (config["r"], False, None)
    assert str(workbench.home) not in answer.text
    assert client.get(ADAPTERS, params={"base_model": "starter"}).json()["data"] == [found]
    assert client.get(ADAPTERS, params={"base_model": "other"}).json()["data"] == []


def test_an_export_is_a_job_whose_file_is_then_there(
    client: TestClient, adapter: Adapter, workbench: Workbench
) -> None:
    begun = client.post(f"{ADAPTERS}/sums/export", json={"format": "gguf", "quantization": "q8_0"})
    assert begun.status_code == 202, begun.text
    address = begun.headers["location"]
    assert (begun.json()["status"], begun.json()["quantization"]) == ("queued", "Q8_0")
    in_use = client.delete(f"{ADAPTERS}/sums")
    assert in_use.status_code == 409
    assert begun.json()["id"] in in_use.json()["detail"]
    assert client.get(f"{address}/file").status_code == 409
    run_in_foreground(workbench, workbench.jobs.require(begun.json()["id"]), lambda event: None)
    done = client.get(address).json()
    assert done["status"] == "completed"
    assert workbench.path(done["file_path"]).stat().st_size == done["size_bytes"]
    assert client.get(f"{ADAPTERS}/sums").json()["gguf_path"] == done["file_path"]
    assert client.get(EXPORTS).json()["data"] == [done]
    sent = client.get(f"{address}/file")
    assert sent.content == workbench.path(done["file_path"]).read_bytes()
    assert sent.headers["content-disposition"].startswith("attachment")
    assert client.delete(f"{ADAPTERS}/sums").status_code == 204
    assert not workbench.path(adapter.folder).exists()
    assert client.get(address).json()["adapter_id"] is None


@pytest.mark.parametrize("asked", [{"quantization": "Q4_K_M"}, {"format": "onnx"}, {"output": "/etc/x"}])
def test_what_cannot_be_exported_is_refused(asked: dict[str, str], client: TestClient, workbench: Workbench) -> None:
    assert client.post(f"{ADAPTERS}/sums/export", json=asked).status_code == 422
    assert client.get(EXPORTS).json()["data"] == []


def test_an_export_sent_twice_with_one_key_is_one_job(client: TestClient, workbench: Workbench) -> None:
    headers = {"Idempotency-Key": "once"}
    first, again = (client.post(f"{ADAPTERS}/sums/export", json={}, headers=headers) for _ in range(2))
    assert first.json() == again.json()
    assert again.headers["location"] == first.headers["location"]
    assert [job.status for job in workbench.jobs.newest(limit=1)] == [JobStatus.QUEUED]
    assert len(client.get(EXPORTS).json()["data"]) == 1
    assert client.post(f"{ADAPTERS}/sums/export", json={"format": "merged"}, headers=headers).status_code == 422


def test_a_damaged_adapter_is_not_exported(client: TestClient, adapter: Adapter, workbench: Workbench) -> None:
    (workbench.path(adapter.folder) / "adapter_model.safetensors").write_bytes(b"x")
    answer = client.post(f"{ADAPTERS}/sums/export", json={})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_data")
    assert str(workbench.home) not in answer.text


def test_a_training_job_is_no_export(client: TestClient, adapter: Adapter) -> None:
    assert client.get(f"{EXPORTS}/{adapter.training_job_id}").status_code == 404
