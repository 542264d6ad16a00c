"""What a model folder must not say: each file is refused before anything of it is loaded, and the good ones are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import InvalidModel
from lorasmith.model_configs import check_adapter_config, check_configs
from lorasmith.model_families import architectures, causal_models, table
from lorasmith.model_files import check_model_folder

ELSEWHERE = "evil/repo--modeling.Evil"


@pytest.fixture
def copy(starter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(starter, tmp_path / "model"))


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_transformers_that_keeps_its_list_elsewhere_is_named() -> None:
    with pytest.raises(InvalidModel, match="has no MOVED_NAMES in models/auto/modeling_auto.py"):
        table("models/auto/modeling_auto.py", "MOVED_NAMES")


@pytest.mark.parametrize("kind", ["gpt2", "mamba", "bloom", "olmo2", "gpt_neox", "qwen3_moe", "granite", "falcon"])
def test_a_family_without_a_fast_path_is_let_in(kind: str, copy: Path) -> None:
    known = causal_models()
    assert known is not None
    change(copy / "config.json", model_type=kind, architectures=sorted(known[kind]))
    check_model_folder(copy)


def test_a_model_with_eyes_is_let_in_for_its_language_model() -> None:
    assert {"Qwen3_5ForCausalLM", "Qwen3_5ForConditionalGeneration", "Qwen3_5Model"} == architectures("qwen3_5")


def test_a_part_of_a_config_without_a_name_is_let_in(copy: Path) -> None:
    change(copy / "config.json", attn_config={"model_type": ""})  # as transformers saves an MPT
    check_model_folder(copy)


CONFIGS: list[dict[str, Any]] = [
    {"model_type": "evil"},
    {"model_type": ""},
    {"model_type": None},
    {"model_type": ["llama"]},
    {"model_type": "../llama"},
    {"model_type": "bert-base"},
    {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
    {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
    {"architectures": ["EvilForCausalLM"]},
    {"architectures": ["LlamaForSequenceClassification"]},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": [{"LlamaForCausalLM": 1}]},
    {"auto_map": {"AutoModelForCausalLM": ELSEWHERE}},
    {"auto_map": {"AutoConfig": ELSEWHERE}},
    {"text_config": {"auto_map": {"AutoModel": ELSEWHERE}}},
    {"experts": [{"auto_map": {"AutoModel": ELSEWHERE}}]},
    {"_attn_implementation": "evil/kernel"},
    {"_attn_implementation": {"": "evil/kernel"}},
    {"_attn_implementation_internal": "evil/kernel"},
    {"text_config": {"_attn_implementation_internal": "evil/kernel"}},
    {"_experts_implementation": "evil/kernel"},
    {"attn_implementation": "evil/kernel:latest"},
    {"custom_pipelines": {"x": {"impl": "evil.py"}}},
    {"custom_generate": "evil/repo"},
    {"trust_remote_code": True},
    {"configuration_files": ["config.4.0.0.json"]},
    {"tokenizer_class": "RagRetriever"},
    {"tokenizer_class": "AutoModel"},
    {"tokenizer_class": "evil.Tokenizer"},
    {"tokenizer_class": 7},
    {"vision_config": {"model_type": "../../evil"}},
    {"quantization_config": {"quant_method": "evil", "modules": "os"}},
    {"quantization_config": {"quant_method": "os.system"}},
    {"quantization_config": {"quant_method": ["gptq"]}},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=json.dumps)
def test_a_config_of_another_kind_is_refused(fields: dict[str, Any], copy: Path) -> None:
    change(copy / "config.json", **fields)
    with pytest.raises(InvalidModel, match=r"config.json has .*, expected ") as raised:
        check_model_folder(copy)
    assert raised.value.hint


TOKENIZERS: list[dict[str, Any]] = [
    {"tokenizer_class": "RagRetriever"},
    {"tokenizer_class": "pipeline"},
    {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}},
    {"auto_map": {"AutoTokenizer": [ELSEWHERE, None]}},
    {"auto_map": [ELSEWHERE, None]},
    {"vocab_file": "/etc/passwd"},
    {"merges_file": "../../secret.txt"},
    {"sp_model_file": {"path": "/etc/passwd"}},
    {"fast_tokenizer_files": ["../tokenizer.1.0.json"]},
    {"fast_tokenizer_files": "tokenizer.1.0.json"},
    {"init_inputs": ["/etc/passwd"]},
    {"trust_remote_code": True},
]


@pytest.mark.parametrize("fields", TOKENIZERS, ids=json.dumps)
def test_a_tokenizer_from_elsewhere_is_refused(fields: dict[str, Any], copy: Path) -> None:
    change(copy / "tokenizer_config.json", **fields)
    with pytest.raises(InvalidModel, match=r"tokenizer_config.json has .*, expected ") as raised:
        check_model_folder(copy)
    assert raised.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer_class": "PreTrainedTokenizerFast", "special_tokens_map_file": "/root/.cache/huggingface/map.json"},
        {"tokenizer_class": "LlamaTokenizerFast", "tokenizer_file": "/root/.cache/huggingface/tokenizer.json"},
        {"tokenizer_class": "Qwen2Tokenizer", "auto_map": {"AutoTokenizer": ["tokenization.Mine", None]}},
        {"tokenizer_class": "GPT2Tokenizer", "name_or_path": "evil/repo", "vocab_file": None, "init_inputs": []},
    ],
    ids=json.dumps,
)
def test_what_good_tokenizers_of_the_hub_say_is_let_in(fields: dict[str, Any], copy: Path) -> None:
    change(copy / "tokenizer_config.json", **fields)
    check_model_folder(copy)


ADAPTERS: list[dict[str, Any]] = [
    {"megatron_config": {"x": 1}, "megatron_core": "antigravity"},
    {"peft_type": "PROMPT_TUNING", "tokenizer_kwargs": {"trust_remote_code": True}},
    {"peft_type": "XLORA", "adapters": {"0": "evil/repo"}},
    {"peft_type": None},
    {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
    {"auto_mapping": "os"},
    {"auto_map": {"AutoModel": ELSEWHERE}},
]


@pytest.mark.parametrize("fields", ADAPTERS, ids=json.dumps)
def test_an_adapter_that_brings_modules_with_it_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "adapter_config.json"
    good = {"peft_type": "LORA", "base_model_name_or_path": "evil/base", "megatron_config": None, "auto_mapping": None}
    path.write_text(json.dumps(good))
    check_configs(tmp_path)
    check_adapter_config(path)
    path.write_text(json.dumps(good | fields))
    with pytest.raises(InvalidModel, match=r"adapter_config.json has .*, expected "):
        check_configs(tmp_path)
        check_adapter_config(path)


Damage = Callable[[Path], Any]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds list, expected an object"),
    "no JSON": (lambda folder: (folder / "tokenizer_config.json").write_text("{"), "is not valid JSON"),
    "deep": (lambda folder: (folder / "config.json").write_text('{"a":' + "[" * 100_000), "is not valid JSON"),
    "an adapter beside it": (
        lambda folder: (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "evil/base"}'),
        "holds an adapter beside the model",
    ),
    "a link": (
        lambda folder: (folder / "more.jinja").symlink_to("/etc/passwd"),
        "is a link to /etc/passwd, out of its folder",
    ),
    "a shard above": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../x.safetensors"}}'
        ),
        "expected a safetensors file of its folder",
    ),
    "a shard that is a pickle": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "pytorch_model.bin"}}'
        ),
        "expected a safetensors file of its folder",
    ),
    "no shards": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}'),
        "has no weight_map",
    ),
    "a header that is a list": (
        lambda folder: (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]"),
        "is not a safetensors file",
    ),
    "a header without places": (
        lambda folder: (folder / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b'{"a":{}}'),
        "is not a safetensors file",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_folder_that_is_not_what_it_should_be_is_refused(name: str, copy: Path) -> None:
    damage, message = DAMAGES[name]
    damage(copy)
    with pytest.raises(InvalidModel, match=message):
        check_model_folder(copy)
