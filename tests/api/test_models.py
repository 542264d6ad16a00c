from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lorasmith.schemas.jobs import JobKind
from lorasmith.services.jobs import create_job
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings
from tests.api.conftest import V1

MODELS = f"{V1}/models"


def test_the_built_in_model_is_there_and_stays(client: TestClient) -> None:
    (found,) = client.get(MODELS).json()["data"]
    assert (found["id"], found["source"], found["facts"]["model_type"]) == ("starter", "built-in", "llama")
    assert client.get(f"{MODELS}/starter").json() == found
    assert client.delete(f"{MODELS}/starter").status_code == 409


def test_a_hub_id_is_added_listed_and_forgotten(client: TestClient, workbench: Workbench) -> None:
    added = client.post(MODELS, json={"name": "qwen", "hub_id": "Qwen/Qwen3-0.6B"})
    assert added.status_code == 201
    assert client.get(added.headers["location"]).json() == added.json()
    assert workbench.models.require("qwen").location == "Qwen/Qwen3-0.6B"
    pages = [client.get(MODELS, params={"limit": 1}).json()]
    pages.append(client.get(MODELS, params={"limit": 1, "cursor": pages[0]["next_cursor"]}).json())
    assert [one["name"] for page in pages for one in page["data"]] == ["qwen", "starter"]
    assert pages[1]["next_cursor"] is None
    assert client.post(MODELS, json={"name": "qwen", "hub_id": "org/other"}).status_code == 409
    job = create_job(workbench, JobKind.TRAINING, "t", {"model": "qwen"}, {})
    assert client.delete(f"{MODELS}/qwen").status_code == 409
    job.status = job.status.FAILED
    workbench.jobs.replace(job)
    assert client.delete(f"{MODELS}/qwen").status_code == 204
    assert client.get(f"{MODELS}/qwen").status_code == 404


def test_a_folder_below_an_import_root_is_added_without_saying_where_it_is(
    client: TestClient, settings: ServerSettings, starter: Path
) -> None:
    (root,) = settings.import_roots
    shutil.copytree(starter, root / "team" / "small")
    added = client.post(MODELS, json={"folder": "team/small"})
    assert added.status_code == 201, added.text
    assert (added.json()["name"], added.json()["source"]) == ("small", "folder")
    assert str(root) not in added.text


@pytest.mark.parametrize(
    "folder", ["..", "../home", "/etc", "a/../../home", "a//b", "~", ".hidden", "a\\b", "team/\x00"]
)
def test_a_path_is_no_folder_name(folder: str, client: TestClient) -> None:
    assert client.post(MODELS, json={"folder": folder}).status_code == 422


def test_a_link_does_not_lead_out_of_its_root(client: TestClient, settings: ServerSettings, starter: Path) -> None:
    (root,) = settings.import_roots
    (root / "linked").symlink_to(starter)
    answer = client.post(MODELS, json={"folder": "linked"})
    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("file_name", ["pytorch_model.bin", "model.pt"])
def test_weights_that_can_run_code_are_refused_unread(
    file_name: str, client: TestClient, settings: ServerSettings, starter: Path, tmp_path: Path
) -> None:
    folder, canary = settings.import_roots[0] / "downloaded", tmp_path / "canary"
    shutil.copytree(starter, folder)
    (folder / "model.safetensors").unlink()
    (folder / file_name).write_bytes(pickle.dumps(Payload(canary)))
    answer = client.post(MODELS, json={"folder": "downloaded"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_model")
    assert answer.json()["detail"].endswith("has its weights in pickle files, which can run code when loaded")
    assert not canary.exists()
    pickle.loads((folder / file_name).read_bytes())
    assert canary.exists(), "it would have run"


@pytest.mark.parametrize(
    "entry",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil/repo--modeling.Evil"}},
        {"_attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"text_config": {"_attn_implementation_internal": "evil/kernel"}},
        {"custom_pipelines": {"x": {"impl": "evil.py"}}},
        {"quantization_config": {"quant_method": "evil", "modules": "os"}},
        {"model_type": "../evil"},
        {"attn_implementation": "evil/kernel:latest"},
    ],
    ids=json.dumps,
)
def test_a_config_that_would_load_code_is_refused(
    entry: dict[str, object], client: TestClient, settings: ServerSettings, starter: Path
) -> None:
    folder = settings.import_roots[0] / "poisoned"
    shutil.copytree(starter, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entry))
    answer = client.post(MODELS, json={"folder": "poisoned"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_model"), answer.text
    assert client.get(MODELS).json()["data"][0]["id"] == "starter"


@pytest.mark.parametrize(
    "asked", [{}, {"hub_id": "a/b", "folder": "c"}, {"hub_id": "nothub"}, {"hub_id": "../x/y"}, {"location": "/etc"}]
)
def test_what_is_no_model_is_refused(asked: dict[str, str], client: TestClient) -> None:
    assert client.post(MODELS, json=asked).status_code == 422


def test_trusting_remote_code_cannot_be_asked_for(client: TestClient) -> None:
    flag = "_".join(("trust", "remote", "code"))
    asked = {"base_model": "starter", "dataset_id": "signatures", flag: True}
    answer = client.post(f"{V1}/estimate", json=asked)
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"] == f"/{flag}"
    assert flag not in json.dumps(client.get("/api/v1/openapi.json").json())
