"""Merging an adapter into its base, against PEFT's unmerged forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lorasmith.engine.adapters.merging import attach, fold, merge, stored_dtype
from lorasmith.engine.models.loading import load_adapter
from lorasmith.errors import InvalidModel
from lorasmith.files import read_json, write_json

IDS = torch.arange(40).remainder(96).view(2, 20)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {
    "plain": LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION),
    "rslora": LoraConfig(r=16, lora_alpha=8, target_modules=ATTENTION, use_rslora=True),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[*ATTENTION, "down_proj"],
        rank_pattern={"q_proj": 8, "layers.1.self_attn.v_proj": 2},
        alpha_pattern={"k_proj": 32, "down_proj": 1},
        use_rslora=True,
    ),
    "dora": LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, use_dora=True),
    "output_layer": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"]),
    "embedding": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "embed_tokens"]),
    "trained_output_layer": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


def tiny_llama(tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def save_adapter(folder: Path, config: LoraConfig) -> Path:
    """A PEFT folder in which no trained tensor is zero."""
    wrapped = get_peft_model(tiny_llama(), config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            torch.manual_seed(len(name))
            parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return folder


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_merged_model_answers_as_the_unmerged_peft_model(kind: str, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, KINDS[kind])
    unmerged = logits(load_adapter(tiny_llama(), folder))
    assert (unmerged - logits(tiny_llama())).abs().max() > 0.1
    torch.testing.assert_close(
        logits(merge(tiny_llama(), folder)), unmerged, atol=1e-5, rtol=0
    )  # float32, logits near 3


def test_each_merged_weight_is_the_base_plus_scale_times_b_a(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, KINDS["rslora"])
    base, merged = tiny_llama(), merge(tiny_llama(), folder)
    factors = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.k_proj"
    update = factors[f"base_model.model.{name}.lora_B.weight"] @ factors[f"base_model.model.{name}.lora_A.weight"]
    expected = base.get_submodule(name).weight + 8 / 16**0.5 * update  # rsLoRA: alpha / sqrt(rank)
    torch.testing.assert_close(merged.get_submodule(name).weight, expected, atol=1e-6, rtol=0)  # float32, 16 terms
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())


@pytest.mark.parametrize(("kind", "tied"), [("plain", True), ("output_layer", False), ("embedding", False)])
def test_embeddings_stay_tied_unless_the_adapter_touches_one(kind: str, tied: bool, tmp_path: Path) -> None:
    merged = merge(tiny_llama(), save_adapter(tmp_path / "adapter", KINDS[kind]))
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) is tied
    merged.save_pretrained(tmp_path / "merged")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert reloaded.config.tie_word_embeddings is tied
    torch.testing.assert_close(logits(reloaded), logits(merged), atol=0, rtol=0)


def test_a_bfloat16_model_is_merged_in_float32(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, KINDS["plain"])
    merged = merge(tiny_llama().to(torch.bfloat16), folder)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}


def test_stored_dtype_is_that_of_most_parameters(tmp_path: Path) -> None:
    tiny_llama().to(torch.float16).save_pretrained(tmp_path)
    assert stored_dtype(tmp_path) == torch.float16


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"quantization_config": {"load_in_4bit": True}})
    with pytest.raises(InvalidModel, match="is stored quantised; an adapter is merged into full weights"):
        stored_dtype(tmp_path)


def test_a_base_in_eight_bits_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    save_file({"weight": torch.zeros(4, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidModel, match="stores its weights as I8; supported: F32, F16, BF16"):
        stored_dtype(tmp_path)


def test_an_adapter_that_is_not_lora_is_refused(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path)
    with pytest.raises(InvalidModel, match="is a IA3 adapter; only LORA adapters can be merged or exported"):
        merge(tiny_llama(), tmp_path)


def test_an_adapter_with_a_weight_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, KINDS["plain"])
    factors = load_file(folder / "adapter_model.safetensors")
    next(iter(factors.values()))[0, 0] = float("nan")
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidModel, match="the adapter cannot be merged: NaNs detected in the merged weights"):
        fold(attach(tiny_llama(), folder))


@pytest.mark.parametrize("field", [{"ensure_weight_tying": True}, {"trainable_token_indices": [1, 2]}])
def test_an_adapter_that_changes_tied_embeddings_together_is_refused(field: dict[str, object], tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, KINDS["embedding"])
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | field)
    with pytest.raises(InvalidModel, match=f"changes tied embeddings together .{next(iter(field))} is set."):
        attach(tiny_llama(), folder)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path, KINDS["plain"])
    config = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", config | {"r": 8})
    with pytest.raises(InvalidModel, match="does not fit LlamaForCausalLM"):
        merge(tiny_llama(), folder)
