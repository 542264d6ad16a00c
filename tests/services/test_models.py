from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lorasmith.errors import InvalidModel, NotFound
from lorasmith.model_files import read_facts
from lorasmith.services.models import add_model, list_models, resolve_model
from lorasmith.services.workbench import Workbench


@pytest.fixture
def copy(starter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(starter, tmp_path / "model"))


def test_the_built_in_model_is_listed_with_its_size(workbench: Workbench) -> None:
    (entry,) = list_models(workbench)
    assert entry.name == "starter"
    assert entry.facts is not None
    assert 2e6 <= entry.facts.parameters <= 4e6
    assert entry.facts.context_tokens == 1024
    assert entry.facts.has_chat_template


def test_the_facts_agree_with_transformers(starter: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(starter)
    facts = read_facts(starter)
    assert facts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert facts.architecture == type(model).__name__


def test_a_registered_folder_is_used_by_its_name(workbench: Workbench, copy: Path) -> None:
    add_model(workbench, str(copy), "mine")
    assert resolve_model(workbench, "mine").location == str(copy)


def test_a_folder_without_weights_is_refused(workbench: Workbench, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(InvalidModel, match=r"holds no weights: expected \*.safetensors"):
        resolve_model(workbench, str(copy))


def test_pickled_weights_are_refused_with_the_way_to_convert_them(workbench: Workbench, copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(InvalidModel, match="pickle files, which can run code") as raised:
        add_model(workbench, str(copy), None)
    assert raised.value.hint is not None
    assert "save_pretrained" in raised.value.hint


def test_a_cut_off_weight_file_is_refused(workbench: Workbench, copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InvalidModel, match="is damaged"):
        resolve_model(workbench, str(copy))


def test_a_shard_that_the_index_names_and_nobody_downloaded(workbench: Workbench, copy: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(InvalidModel, match="lacks model-00002.safetensors, which its index names"):
        resolve_model(workbench, str(copy))


@pytest.mark.parametrize(("name", "what"), [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer")])
def test_what_else_a_folder_needs(workbench: Workbench, copy: Path, name: str, what: str) -> None:
    (copy / name).unlink()
    with pytest.raises(InvalidModel, match=what):
        resolve_model(workbench, str(copy))


def test_an_unknown_name_gets_the_nearest(workbench: Workbench) -> None:
    with pytest.raises(NotFound, match="no model 'startr'; did you mean 'starter'"):
        resolve_model(workbench, "startr")


def test_a_hub_id_is_left_to_the_engine(workbench: Workbench) -> None:
    assert resolve_model(workbench, "Qwen/Qwen2.5-0.5B").location == "Qwen/Qwen2.5-0.5B"
