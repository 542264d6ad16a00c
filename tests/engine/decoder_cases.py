"""Tiny random models of every family that the packed decoder knows, and rows for them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.lora.integer_products import why_no_integers
from lorasmith.engine.models.decoder import PackedDecoder
from lorasmith.engine.models.families import NORMS_ADD_ONE, read_decoder
from lorasmith.engine.models.packing import pack
from lorasmith.engine.training.checkpoints import trainable

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": 20, "head_dim": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gemma": {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 16,
        "query_pre_attn_scalar": 10,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    },
    "smollm3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 2.0,
        "mlp_bias": True,
    },
}
PER_LAYER = {"layer_types", "no_rope_layers"}
LENGTHS = [33, 7, 61, 2, 18]  # of rows; the one of 2 tokens has a single target
ALL_LINEAR = "all-linear"
NO_INTEGERS = why_no_integers()
# A CPU cannot be installed; without a compiler CI fails
needs_integers = pytest.mark.skipif(
    NO_INTEGERS is not None and not ("gcc" in NO_INTEGERS and os.environ.get("CI")), reason=str(NO_INTEGERS)
)


def tiny_base(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model with weights, norms and biases all random, so that no term of a formula is hidden by a one or a zero."""
    torch.manual_seed(1)
    settings = {**SIZES, **FAMILIES.get(family, {}), **changes}
    for name in PER_LAYER & settings.keys():
        settings[name] = list(islice(cycle(settings[name]), settings["num_hidden_layers"]))
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if "norm" in name or "bias" in name else 0.12))
            if "norm" in name and family not in NORMS_ADD_ONE:
                parameter.add_(1)
    return model.eval()


def adapted(base: Any, *, rank: int = 4, dropout: float = 0.0, **settings: Any) -> PeftModel:
    """LoRA on every linear layer unless told otherwise, with B away from zero."""
    targets = settings.pop("target_modules", ALL_LINEAR)
    config = LoraConfig(
        r=rank, lora_alpha=6, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM", **settings
    )
    model = get_peft_model(base, config)
    assert isinstance(model, PeftModel)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def rounded_model(family: str, dtype: torch.dtype, **changes: Any) -> PeftModel:
    """Frozen weights rounded to bf16, in `dtype`; the adapter in fp32."""
    model = adapted(tiny_base(family, **changes).to(torch.bfloat16).to(dtype))
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


def random_rows(lengths: Iterable[int], *, vocabulary: int = 97, seed: int = 3) -> list[RenderedExample]:
    """Rows with trained stretches in the middle and at the end, as answers of several turns are."""
    rng = random.Random(seed)
    rows = []
    for number, length in enumerate(lengths):
        ids = [rng.randrange(3, vocabulary) for _ in range(length)]
        trained = [index >= length // 2 or 3 <= index < length // 4 for index in range(length)]
        rows.append(RenderedExample(number + 1, ids, trained))
    return rows


def reference_gradients(
    model: PeftModel, rows: list[RenderedExample], scale: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss in nats and adapter gradients by PEFT, transformers and autograd, row by row without packing."""
    total = 0.0
    model.zero_grad(set_to_none=True)
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        chosen = torch.tensor(row.trained[1:])
        loss = F.cross_entropy(logits[chosen], ids[0, 1:][chosen], reduction="sum")
        (loss * scale).backward()
        total += loss.item()
    return total, adapter_gradients(model)


def adapter_gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equals_peft(
    model: PeftModel, rows: list[RenderedExample], *, scale: float = 0.01, share: bool = False, **settings: Any
) -> None:
    """Loss and gradients of the packed decoder with these settings; `share` lets rows share how they begin."""
    nats, reference = reference_gradients(model, rows, scale)
    model.zero_grad(set_to_none=True)
    ours = PackedDecoder(read_decoder(model), **settings).gradients(pack(rows, share=share), scale, None)
    assert ours == pytest.approx(nats, rel=1e-6), (ours, nats)
    difference = worst_difference(adapter_gradients(model), reference)
    assert difference <= 1e-5, difference  # fp32, sums over all tokens


def fp32_and_autocast(
    family: str, rows: list[RenderedExample], **changes: Any
) -> tuple[float, dict[str, torch.Tensor], list[float]]:
    """Summed loss in nats and adapter gradients by PEFT in fp32, and how far from them PEFT is under bf16 autocast.

    Both on weights rounded to bf16; the distances are those of `distances`.
    """
    nats, truth = reference_gradients(rounded_model(family, torch.float32, **changes), rows, 0.01)
    with torch.autocast("cpu", torch.bfloat16):
        _, rounded = reference_gradients(rounded_model(family, torch.bfloat16, **changes), rows, 0.01)
    return nats, truth, distances(rounded, truth)


def worst_difference(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """max|Δ| / max|g| of the worst tensor."""
    assert ours.keys() == reference.keys()
    return max(((ours[n] - reference[n]).abs().max() / reference[n].abs().max()).item() for n in reference)


def distances(ours: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> list[float]:
    """|Δ| / |g| over all tensors, and max|Δ| / max|g| of the worst one."""
    squares = sum((ours[name] - truth[name]).square().sum().item() for name in truth)
    whole = sum(tensor.square().sum().item() for tensor in truth.values())
    return [(squares / whole) ** 0.5, worst_difference(ours, truth)]
