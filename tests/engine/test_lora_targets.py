"""What roles mean on models of many families, tiny and without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lorasmith.engine.lora.config import LoRAConfig, adapted_shapes, fit
from lorasmith.engine.lora.targets import left_out_note, resolve_target_modules
from lorasmith.engine.training.estimation.skeleton import fitted
from lorasmith.errors import InvalidSpec
from tests.engine.decoder_cases import SIZES

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 32}
MIXED = {"layer_types": ["conv", "conv", "full_attention"]}


def without_weights(family: str, **changes: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **changes}))


@pytest.mark.parametrize(
    ("family", "changes", "attention", "mlp"),
    [
        ("starcoder2", {}, "k_proj o_proj q_proj v_proj", "c_fc c_proj"),
        ("gpt_bigcode", {}, "attn.c_proj c_attn", "c_fc mlp.c_proj"),  # c_proj in both
        ("gptj", {"rotary_dim": 8}, "k_proj out_proj q_proj v_proj", "fc_in fc_out"),
        ("opt", {}, "k_proj out_proj q_proj v_proj", "fc1 fc2"),
        ("bloom", {}, "dense query_key_value", "dense_4h_to_h dense_h_to_4h"),
        ("lfm2", MIXED, "k_proj q_proj self_attn.out_proj v_proj", "w1 w2 w3"),  # conv has an out_proj too
        (
            "deepseek_v3",
            EXPERTS,
            "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj",
            "",
        ),
        ("qwen2_moe", EXPERTS, "k_proj o_proj q_proj v_proj", "down_proj gate_proj up_proj"),
    ],
)
def test_a_role_is_all_of_its_linear_layers(family: str, changes: Any, attention: str, mlp: str) -> None:
    model = without_weights(family, **changes)
    assert resolve_target_modules(model, "attention") == attention.split()
    if mlp:  # a DeepSeek's are taken for those of its experts
        assert resolve_target_modules(model, "mlp") == mlp.split()


def test_layers_whose_weights_are_read_past_an_update_are_not_adapted() -> None:
    model = without_weights("mamba")
    assert resolve_target_modules(model, "all") == ["in_proj"]
    assert "x_proj.weight" in str(left_out_note(model, "all"))
    with pytest.raises(InvalidSpec, match="target module 'dt_proj' cannot be adapted: an update of it would"):
        resolve_target_modules(model, ["in_proj", "dt_proj"])
    assert "router" not in resolve_target_modules(without_weights("phimoe", **EXPERTS), "all")


def test_experts_that_no_update_reaches_are_told() -> None:
    model = without_weights("mixtral", **EXPERTS)
    note = left_out_note(model, "all")
    assert note is not None
    assert note.startswith("target_modules 'all': ")
    assert note.endswith("stay as they are: experts.gate_up_proj, experts.down_proj, gate.weight")
    assert left_out_note(model, "attention") is None
    assert left_out_note(without_weights("olmo2"), "all") is None
    with pytest.raises(InvalidSpec, match="no linear layer in the role 'mlp'") as error:
        resolve_target_modules(model, "mlp")
    assert "cannot be adapted: experts.gate_up_proj" in str(error.value.hint)


@pytest.mark.parametrize("wanted", ["all", ["o_proj", "q_a_proj"]])
def test_the_adapter_is_on_every_layer_that_is_resolved(wanted: Any) -> None:
    """PEFT would put it on the experts of a DeepSeek instead of the layers called `down_proj`, and double its rank."""
    model = without_weights("deepseek_v3", **EXPERTS, first_k_dense_replace=1)
    config = fit(LoRAConfig(target_modules=wanted), model)
    shapes = adapted_shapes(model, list(config.target_modules), None)
    with_adapter = get_peft_model(model, config.to_peft_config(), low_cpu_mem_usage=True)
    assert {name for name, module in with_adapter.get_base_model().named_modules() if hasattr(module, "lora_A")} == set(
        shapes
    )


def test_names_that_peft_takes_for_experts_are_not_adapted() -> None:
    model = without_weights("deepseek_v3", **EXPERTS, first_k_dense_replace=1)
    assert "shared_experts.down_proj.weight" not in str(left_out_note(model, "attention"))
    assert "down_proj.weight" in str(left_out_note(model, "all"))
    with pytest.raises(InvalidSpec, match="target module 'down_proj' cannot be adapted"):
        resolve_target_modules(model, ["down_proj"])


def test_a_model_without_linear_layers_says_what_it_has() -> None:
    with pytest.raises(InvalidSpec, match="no linear layer in the role 'all'") as error:
        resolve_target_modules(without_weights("gpt2"), "all")
    assert str(error.value.hint).endswith("c_proj.weight, c_fc.weight, c_attn.weight")


def test_a_shortened_model_is_adapted_in_the_layers_that_it_has() -> None:
    targets = resolve_target_modules(without_weights("lfm2", **MIXED), "all")
    first = without_weights("lfm2", num_hidden_layers=1, layer_types=["conv"])
    assert fitted(LoRAConfig(target_modules=targets), first).target_modules == ["in_proj", "out_proj", "w1", "w2", "w3"]
