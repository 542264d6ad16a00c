from __future__ import annotations

import threading
import time

from starlette.testclient import TestClient

from lorasmith.schemas.jobs import JobKind
from lorasmith.services.jobs import run_in_foreground
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


def run_next_job(workbench: Workbench) -> None:
    while not (jobs := workbench.jobs.newest(limit=1, kind=JobKind.ESTIMATE)):
        time.sleep(0.05)
    run_in_foreground(workbench, jobs[0], lambda event: None)


def test_an_estimate_is_waited_for_as_long_as_the_caller_prefers(client: TestClient, workbench: Workbench) -> None:
    queued = client.post(PATH, json=ASKED)
    assert (queued.status_code, queued.json()["status"], queued.json()["estimate"]) == (202, "queued", None)
    workbench.jobs.remove(queued.json()["id"])
    runner = threading.Thread(target=run_next_job, args=(workbench,))
    runner.start()
    answer = client.post(PATH, json=ASKED, headers={"Prefer": "respond-async, wait=60"})
    runner.join()
    assert answer.status_code == 200, answer.text
    assert answer.headers["preference-applied"] == "wait=60"
    estimate = answer.json()["estimate"]
    assert estimate["steps"] == 10
    assert estimate["memory"]["peak_bytes"] > 0
    assert client.get(answer.headers["location"]).json() == answer.json()


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
        ({"qlora_config": {"enabled": True}}, 422),
        ({"measuring_s": 3600}, 422),
    ):
        answer = client.post(PATH, json=ASKED | wrong)
        assert answer.status_code == status, (wrong, answer.text)
    assert workbench.jobs.list() == []
