"""Quantised bases: how they are loaded, and gradients against PEFT on the same weights dequantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from lorasmith.engine.lora.config import LoRAConfig, fit
from lorasmith.engine.lora.quantized import AS_STORED, Quantization
from lorasmith.engine.lora.quantized_linear import QuantizedLinear, quantized_elements
from lorasmith.engine.models.decoder import PackedDecoder
from lorasmith.engine.models.families import NotPacked, read_decoder
from lorasmith.engine.models.loading import load_model
from lorasmith.engine.models.packing import pack
from lorasmith.engine.models.quantized_loading import half_bytes, load_quantized_model
from lorasmith.errors import InvalidModel, InvalidSpec
from tests.engine.decoder_cases import (
    FAMILIES,
    LENGTHS,
    adapted,
    adapter_gradients,
    random_rows,
    reference_gradients,
    tiny_base,
    worst_difference,
)

NF4 = Quantization("nf4")
IDS = torch.arange(3, 35).unsqueeze(0)


def stored(family: str, folder: Path, **changes: Any) -> Path:
    tiny_base(family, **changes).save_pretrained(folder)
    return folder


def with_dequantised_weights(base: Any, quantized: Any) -> Any:
    """`base` with the values of `quantized` in its linear layers."""
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if isinstance(module, QuantizedLinear):
                base.get_submodule(name).weight.copy_(module.dequantized())
    return base


@pytest.mark.parametrize(
    ("family", "quantization"),
    [
        ("llama", NF4),
        ("qwen2", Quantization("fp4")),
        ("phi3", Quantization("nf4", False)),
        ("mistral", Quantization("int8")),
    ],
    ids=str,
)
def test_gradients_equal_those_of_peft_on_the_dequantised_weights(
    tmp_path: Path, family: str, quantization: Quantization
) -> None:
    base = load_quantized_model(stored(family, tmp_path), torch.float32, quantization)
    rows = random_rows(LENGTHS)
    trained = sum(row.trained_tokens for row in rows)
    full = with_dequantised_weights(tiny_base(family), base)
    torch.manual_seed(4)  # A
    nats, reference = reference_gradients(adapted(full), rows, 1 / trained)
    torch.manual_seed(4)
    model = adapted(base)

    through_autograd = reference_gradients(model, rows, 1 / trained)
    assert through_autograd[0] == pytest.approx(nats, rel=1e-6)
    assert worst_difference(through_autograd[1], reference) <= 1e-5  # fp32

    model.zero_grad(set_to_none=True)
    decoder = PackedDecoder(read_decoder(model))
    assert set(decoder.decoder.paths.values()) == {quantization.kind}
    for _ in range(2):  # an evaluation between two steps changes nothing
        model.zero_grad(set_to_none=True)
        assert decoder.gradients(pack(rows), 1 / trained, None) / trained == pytest.approx(nats / trained, abs=1e-6)
        assert worst_difference(adapter_gradients(model), reference) <= 1e-5
        assert decoder.loss(pack(rows)) == pytest.approx(nats, abs=1e-4)
        model(input_ids=IDS)


def test_loading_gives_the_model_with_its_linear_layers_quantised(starter: Path) -> None:
    quantized, full = load_model(starter, torch.float32, NF4), load_model(starter)
    assert quantized_elements(quantized) == sum(
        module.weight.numel()
        for name, module in full.named_modules()
        if type(module) is nn.Linear and name != "lm_head"
    )
    assert quantized.generation_config.to_dict() == full.generation_config.to_dict()
    assert quantized.lm_head.weight is quantized.model.embed_tokens.weight  # tied, as in the starter
    with torch.no_grad():
        ours = quantized(IDS).logits
        assert (ours - full(IDS).logits).abs().max() > 0.01
        assert torch.equal(ours, with_dequantised_weights(full, quantized)(IDS).logits)


def test_a_checkpoint_of_the_decoder_alone_and_one_in_bf16_load(tmp_path: Path) -> None:
    folder = stored("qwen2", tmp_path)
    expected = load_quantized_model(folder, torch.float32, NF4)(IDS).logits
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in weights.items()}, folder / "model.safetensors")
    assert torch.equal(load_quantized_model(folder, torch.float32, NF4)(IDS).logits, expected)
    model = load_quantized_model(folder, torch.bfloat16, NF4)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (model(IDS).logits - expected).abs().max() < 0.1 * expected.abs().max()  # 8 bits of mantissa


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_that_stay_in_the_16_bits_of_their_file_compute_what_widened_ones_do(
    tmp_path: Path, family: str
) -> None:
    tiny_base(family).to(torch.bfloat16).save_pretrained(tmp_path)
    with torch.inference_mode():
        widened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(IDS).logits
        assert torch.equal(load_quantized_model(tmp_path, torch.float32, AS_STORED)(IDS).logits, widened)
    assert half_bytes(tmp_path) > 0


def test_a_checkpoint_with_the_names_of_an_older_transformers_loads(tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        vocab_size=80, hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    base = GPTNeoXForCausalLM(config)
    base.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    old = {key.replace("lm_head", "embed_out"): value for key, value in weights.items()}  # as Pythia's files have it
    assert "embed_out.weight" in old
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded = load_quantized_model(tmp_path, torch.float32, Quantization("int8"))

    full = with_dequantised_weights(base, loaded)
    with torch.inference_mode():
        assert torch.equal(loaded.lm_head.weight, base.lm_head.weight)
        assert torch.allclose(loaded(IDS).logits, full(IDS).logits, atol=1e-6)


def test_what_cannot_be_quantised_is_refused(tmp_path: Path) -> None:
    folder = stored("gpt2", tmp_path / "gpt2")
    with pytest.raises(InvalidModel, match=r"c_attn.weight is part of a Conv1D, and only linear layers can be stored"):
        load_quantized_model(folder, torch.float32, NF4)

    folder = stored("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(InvalidModel, match=rf"lacks 1 weights, the first is '{name}'"):
        load_quantized_model(folder, torch.float32, NF4)
    save_file({**weights, name: weights[name][:3].clone()}, folder / "model.safetensors")
    with pytest.raises(InvalidModel, match=rf"{name} has the shape \(3, 48\), its config.json says \(80, 48\)"):
        load_quantized_model(folder, torch.float32, NF4)
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InvalidModel, match="is stored quantised already"):
        load_quantized_model(folder, torch.float32, NF4)


def test_a_quantised_layer_cannot_train_whole_be_merged_into_or_stand_beside_full_ones(tmp_path: Path) -> None:
    base = load_quantized_model(stored("qwen2", tmp_path), torch.float32, NF4)
    with pytest.raises(InvalidSpec, match="modules_to_save 'down_proj' is quantised with the base"):
        fit(LoRAConfig(target_modules=["q_proj"], modules_to_save=["down_proj"]), base)
    with pytest.raises(InvalidSpec, match="init 'loftq' starts from what quantising the base loses"):
        fit(LoRAConfig(init="loftq"), tiny_base("qwen2"))
    model = adapted(base)
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        model.merge_and_unload()
    attention = base.model.layers[0].self_attn
    attention.k_proj.base_layer = nn.Linear(48, 24).requires_grad_(False)
    with pytest.raises(NotPacked, match="only some of qkv are quantised"):
        read_decoder(model)
