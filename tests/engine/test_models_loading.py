"""What stands between a folder or a hub repository and the libraries that load it: real pickles and real code, never run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto, tokenization_auto
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from lorasmith.engine.models.loading import load_adapter, load_model, load_tokenizer, model_folder
from lorasmith.errors import InvalidModel
from lorasmith.model_families import causal_models, quantization_methods, tokenizer_classes
from tests.engine.small_jobs import run_engine

COMMIT = "0" * 39 + "1"
Publish = Callable[[Path], Path]


def test_what_transformers_implements_is_read_as_transformers_reads_it() -> None:
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert causal_models() == {kind: frozenset([name]) for kind, name in causal.items()}
    classes, methods = tokenizer_classes(), quantization_methods()
    assert classes is not None
    assert methods is not None
    named = {name for name in tokenization_auto.TOKENIZER_MAPPING_NAMES.values() if name}
    assert {name.removesuffix("Fast") for name in named} <= classes
    assert set(AUTO_QUANTIZATION_CONFIG_MAPPING) <= methods


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (Path.touch, (self.path,))  # type: ignore[return-value]


@pytest.fixture
def publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Put a folder into the cache of the hub as `org/tiny`, as huggingface_hub lays it out; returns its snapshot."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(folder: Path) -> Path:
        repository = tmp_path / "hub" / "models--org--tiny"
        snapshot = repository / "snapshots" / COMMIT
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        (repository / "blobs").mkdir()
        for path in (path for path in folder.rglob("*") if path.is_file()):
            blob = repository / "blobs" / path.relative_to(folder).as_posix().replace("/", "-")
            shutil.copyfile(path, blob)
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return snapshot

    return put


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_repository_of_the_hub_is_checked_and_loaded_from_its_cache(publish: Publish, starter: Path) -> None:
    snapshot = publish(starter)
    folder = model_folder("org/tiny")
    assert folder == snapshot
    assert (folder / "config.json").is_symlink()
    assert load_model(folder).num_parameters() == load_model(starter).num_parameters()
    assert len(load_tokenizer(folder)) == len(load_tokenizer(starter))


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    ("file_name", "fields", "message"),
    [
        ("config.json", {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.Evil"}}, "model_type"),
        ("config.json", {"configuration_files": ["config.5.0.0.json"]}, "configuration_files"),
        (
            "tokenizer_config.json",
            {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
            "Evil",
        ),
        ("generation_config.json", {"custom_generate": "evil/repo"}, "custom_generate"),
    ],
)
def test_a_repository_that_wants_its_code_run_is_refused(
    file_name: str, fields: dict[str, Any], message: str, weights: bool, publish: Publish, starter: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(starter, tmp_path / "model"))
    change(folder / file_name, **fields)
    publish(folder)
    with pytest.raises(InvalidModel, match=message):
        model_folder("org/tiny", weights=weights)


def test_code_beside_a_model_is_not_run(publish: Publish, starter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(starter, tmp_path / "model"))
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\nclass Evil: pass\n"
    (folder / "custom_generate").mkdir()
    for name in ("modeling_evil.py", "custom_generate/generate.py"):
        (folder / name).write_text(code)
    names = {"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}
    change(folder / "config.json", auto_map=names)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_evil.Evil", "modeling_evil.Evil"]})
    publish(folder)
    loaded = load_model(model_folder("org/tiny"))
    load_tokenizer(model_folder("org/tiny"))
    assert type(loaded).__module__.startswith("transformers.")
    assert not canary.exists()


def test_a_pickle_is_not_opened_whatever_stands_beside_it(publish: Publish, starter: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(starter, tmp_path / "model"))
    canary = tmp_path / "canary"
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    publish(folder)
    for place in (str(folder), "org/tiny"):
        with pytest.raises(InvalidModel, match="cannot be loaded as a causal language model: .*model.safetensors"):
            load_model(model_folder(place))
    assert not canary.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert canary.exists()  # it would have shown


def test_an_adapter_that_names_a_module_imports_nothing(
    starter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "canary_module.py").write_text(f"open({str(canary)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model(starter), config).save_pretrained(tmp_path / "adapter")
    load_adapter(load_model(starter), tmp_path / "adapter")
    change(tmp_path / "adapter" / "adapter_config.json", megatron_core="canary_module", megatron_config={"a": 1})
    with pytest.raises(InvalidModel, match="megatron_config"):
        load_adapter(load_model(starter), tmp_path / "adapter")
    assert not canary.exists()


def test_a_family_without_a_fast_path_trains_from_the_hub_through_peft(
    publish: Publish, tokenizer: PreTrainedTokenizerBase, training_job: Callable[..., Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    size = len(tokenizer)
    model = BloomForCausalLM(BloomConfig(vocab_size=size, hidden_size=16, n_layer=1, n_head=2, eos_token_id=2))
    model.save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    publish(tmp_path / "bloom")
    job = training_job(Path("org/tiny"), max_steps=2, lora={"target_modules": ["query_key_value"]})
    result = run_engine(job)
    assert (result["total_steps"], "bloom" in result["fallback"].lower()) == (2, True)
    assert (
        load_adapter(load_model(model_folder("org/tiny")), job / "adapter").peft_config["default"].peft_type == "LORA"
    )
