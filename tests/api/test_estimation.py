from __future__ import annotations

import threading
import time

import pytest
from starlette.testclient import TestClient

from lorasmith.schemas.jobs import JobRequest
from lorasmith.services.jobs import ask, run_in_foreground
from lorasmith.services.workbench import Workbench
from tests.api.conftest import V1

PATH = f"{V1}/estimate"
ASKED = {
    "base_model": "starter",
    "dataset_id": "signatures",
    "preset": "tiny",
    "lora_config": {"rank": 8, "alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "training_config": {"num_epochs": 1, "max_steps": 10, "bf16": False},
    "measuring_s": 1,
}


@pytest.mark.slow
def test_an_estimate_is_a_job_whose_result_is_then_there(client: TestClient, workbench: Workbench) -> None:
    queued = client.post(PATH, json=ASKED)
    assert (queued.status_code, queued.json()["status"], queued.json()["estimate"]) == (202, "queued", None)
    run_in_foreground(workbench, workbench.jobs.require(queued.json()["id"]), lambda event: None)
    found = client.get(queued.headers["location"]).json()
    assert found["status"] == "completed"
    assert found["estimate"]["steps"] == 10
    assert found["estimate"]["memory"]["peak_bytes"] > 0


def test_a_caller_waits_no_longer_than_it_prefers_and_gets_what_ended_meanwhile(
    client: TestClient, workbench: Workbench
) -> None:
    waited = client.post(PATH, json=ASKED, headers={"Prefer": "respond-async, wait=1"})
    assert (waited.status_code, waited.headers["preference-applied"]) == (202, "wait=1")

    def cancel_next() -> None:
        while len(jobs := workbench.jobs.newest(limit=2)) < 2:
            time.sleep(0.05)
        ask(workbench, jobs[0], JobRequest.CANCEL)

    other = threading.Thread(target=cancel_next)
    other.start()
    answer = client.post(PATH, json=ASKED, headers={"Prefer": "wait=60"})
    other.join()
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")


def test_the_fields_are_those_of_the_run_that_the_job_measures(client: TestClient, workbench: Workbench) -> None:
    client.post(PATH, json=ASKED)
    spec = workbench.jobs.newest(limit=1)[0].spec
    assert (spec["lora"]["rank"], spec["lora"]["target_modules"]) == (8, ["q_proj", "v_proj"])
    assert (spec["training"]["max_steps"], spec["training"]["precision"]) == (10, "fp32")
    assert spec["training"]["learning_rate"] == 3e-3, "what was not given is the preset's"


def test_what_is_no_name_is_refused_before_a_job_exists(client: TestClient, workbench: Workbench) -> None:
    for wrong, status in (
        ({"base_model": "/etc"}, 404),
        ({"base_model": "../models/x"}, 404),
        ({"dataset_id": "/etc/passwd"}, 404),
        ({"dataset_id": "signaturs"}, 404),
        ({"preset": "balancd"}, 422),
        ({"training_config": {"fp16": True}}, 422),
        ({"training_config": {"bf16": True, "precision": "fp32"}}, 422),
        ({"qlora_config": {"bits": 5}}, 422),
        ({"measuring_s": 3600}, 422),
    ):
        answer = client.post(PATH, json=ASKED | wrong)
        assert answer.status_code == status, (wrong, answer.text)
    assert workbench.jobs.list() == []
