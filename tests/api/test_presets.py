from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from starlette.testclient import TestClient

from lorasmith.schemas.training_presets import PRESETS
from lorasmith.services import presets
from lorasmith.services.presets import Preset, list_presets
from lorasmith.services.training import build_spec
from lorasmith.services.workbench import Workbench
from tests.api.conftest import V1

PATH = f"{V1}/presets"


def test_the_built_in_presets_are_those_of_the_command_line(client: TestClient) -> None:
    found = client.get(PATH).json()["data"]
    assert [one["name"] for one in found] == list(PRESETS)
    assert found[1]["training_config"] == PRESETS["balanced"]["training"]
    assert client.get(f"{PATH}/quick").json()["lora_config"]["rank"] == 8


def test_an_added_preset_is_one_that_the_command_line_trains_with(client: TestClient, workbench: Workbench) -> None:
    asked = {"name": "careful", "lora_config": {"r": 16}, "training_config": {"learning_rate": 5e-5, "bf16": False}}
    added = client.post(PATH, json=asked)
    assert added.status_code == 201, added.text
    assert client.get(added.headers["location"]).json() == added.json()
    spec = build_spec({"model": "m", "data": "d", "preset": "careful"}, home=workbench.home)
    assert (spec.lora.rank, spec.training.learning_rate, spec.training.precision) == (16, 5e-5, "fp32")
    assert client.post(PATH, json=asked).status_code == 409
    assert client.post(PATH, json={"name": "balanced"}).status_code == 409


def test_wrong_values_are_pointed_at_and_nothing_is_written(client: TestClient, workbench: Workbench) -> None:
    answer = client.post(PATH, json={"name": "x", "lora_config": {"rank": 0}, "training_config": {"lr": 1}})
    assert answer.status_code == 422
    assert {one["pointer"] for one in answer.json()["errors"]} == {"/lora_config/rank", "/training_config/lr"}
    assert list(workbench.path("presets").glob("*")) == []


def test_a_broken_preset_file_is_listed_with_its_problem(client: TestClient, workbench: Workbench) -> None:
    folder = workbench.path("presets")
    folder.mkdir()
    (folder / "odd.yaml").write_text("lora: {rnk: 3}\n")
    last = client.get(PATH).json()["data"][-1]
    assert last["id"] == "odd"
    assert last["problem"] == "presets/odd.yaml: there is no field 'lora.rnk'; did you mean 'lora.rank'?"


def test_pages_of_presets_go_through_all(client: TestClient) -> None:
    names: list[str] = []
    cursor = None
    while True:
        page = client.get(PATH, params={"limit": 3, **({"cursor": cursor} if cursor else {})}).json()
        names += [one["name"] for one in page["data"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
    assert names == list(PRESETS)


def test_of_two_that_add_one_name_at_once_one_is_refused(
    client: TestClient, workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(rank: int) -> int:
        return client.post(PATH, json={"name": "mine", "lora_config": {"r": rank}}).status_code

    with ThreadPoolExecutor() as pool:
        second: list[Future[int]] = []

        def look_while_another_adds(workbench: Workbench) -> list[Preset]:
            found = list_presets(workbench)
            if not second:
                second.append(pool.submit(add, 16))
                time.sleep(0.2)  # until it waits
            return found

        monkeypatch.setattr(presets, "list_presets", look_while_another_adds)
        assert (add(4), second[0].result()) == (201, 409)
    assert client.get(f"{PATH}/mine").json()["lora_config"]["rank"] == 4
