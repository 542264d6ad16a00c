"""The packed decoder against PEFT and transformers, row by row without packing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn

from lorasmith.engine.lora.dropout import RowDropout, bernoulli_positions
from lorasmith.engine.models.attention import BLOCK, KEPT_TOKENS
from lorasmith.engine.models.decoder import PackedDecoder
from lorasmith.engine.models.elementwise import can_compile, compiled
from lorasmith.engine.models.families import NotPacked, pack_weights, read_decoder
from lorasmith.engine.models.head import target_softmax
from lorasmith.engine.models.packing import PackedRows, pack
from lorasmith.engine.training.computation import checked_decoder
from tests.engine.decoder_cases import (
    FAMILIES,
    LENGTHS,
    adapted,
    adapter_gradients,
    assert_equals_peft,
    random_rows,
    reference_gradients,
    tiny_base,
    worst_difference,
)


def decode(model: PeftModel, *, packed: bool = False) -> PackedDecoder:
    decoder = read_decoder(model)
    if packed:
        pack_weights(decoder, model)
    model.zero_grad(set_to_none=True)
    return PackedDecoder(decoder)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_peft_row_by_row(family: str, packed: bool) -> None:
    model, rows = adapted(tiny_base(family)), random_rows(LENGTHS)
    trained = sum(row.trained_tokens for row in rows)
    nats, reference = reference_gradients(model, rows, 1 / trained)

    decoder = decode(model, packed=packed)
    ours = decoder.gradients(pack(rows), 1 / trained, None)

    assert ours / trained == pytest.approx(nats / trained, abs=1e-6)  # fp32
    assert decoder.loss(pack(rows)) == pytest.approx(ours, abs=1e-4)
    assert worst_difference(adapter_gradients(model), reference) <= 1e-5  # fp32, sums of up to 121 tokens


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text"])
def test_a_shared_beginning_changes_no_gradient(family: str) -> None:
    rows = random_rows([70, 58, 45, 31, 20, 64])
    for number, (source, length) in {1: (0, 40), 2: (0, 40), 4: (0, 20), 5: (1, 57)}.items():  # 5 shares what 1 shares
        row = rows[number]
        rows[number] = replace(row, ids=[*rows[source].ids[:length], *row.ids[length:]])
    shared = pack(rows, share=True)
    assert len(shared.ids) == sum(shared.lengths) - 32 - 32 - 16 - 48  # whole blocks
    assert_equals_peft(adapted(tiny_base(family)), rows, share=True)


def test_a_long_shared_beginning_changes_no_gradient() -> None:
    rows = random_rows([KEPT_TOKENS + 60, KEPT_TOKENS + 30, BLOCK + 90])
    start = rows[0].ids[: BLOCK + 70]
    rows[1:] = [replace(row, ids=[*start, *row.ids[len(start) :]]) for row in rows[1:]]
    assert_equals_peft(adapted(tiny_base("llama", max_position_embeddings=1024)), rows, share=True)


def workspaces_of_equal_gradients(make: Callable[[], PeftModel], rows: PackedRows, **saving: Any) -> list[int]:
    """Bytes of the workspace without the setting `saving` and with it, which changes no bit of a gradient."""
    found, sizes = [], []
    for settings in ({}, saving):
        model = make()
        decoder = PackedDecoder(read_decoder(model), **settings)
        decoder.gradients(rows, 0.01, RowDropout(0, 0, range(len(rows.lengths)), rows.lengths))
        found.append(adapter_gradients(model))
        sizes.append(decoder.workspace.size_bytes)
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
    return sizes


@pytest.mark.parametrize(("family", "dropout"), [("qwen3", 0.0), ("qwen3", 0.2), ("gemma3_text", 0.2)])
def test_layers_computed_again_give_the_same_gradients(family: str, dropout: float) -> None:
    rows = pack(random_rows(LENGTHS))
    before, less = workspaces_of_equal_gradients(
        lambda: adapted(tiny_base(family, num_hidden_layers=8), dropout=dropout), rows, recompute=True
    )
    assert less < 0.5 * before


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_attention_weights_that_are_not_kept_give_the_same_gradients(family: str) -> None:
    rows = pack(random_rows([300, 200, KEPT_TOKENS + 1]))
    before, less = workspaces_of_equal_gradients(
        lambda: adapted(tiny_base(family, max_position_embeddings=1024)), rows, lean=True
    )
    assert less < 0.8 * before


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(), reason="no C++ compiler")
@pytest.mark.parametrize("family", ["phi3", "qwen3", "gemma", "gemma3_text", "smollm3"])
def test_compiled_parts_give_the_same_gradients(family: str) -> None:
    assert_equals_peft(adapted(tiny_base(family)), random_rows(LENGTHS), elementwise=compiled())


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rows_of_several_blocks_equal_peft(family: str) -> None:
    lengths = [KEPT_TOKENS + 90, 2 * BLOCK, BLOCK + 1, 5]
    window = {"sliding_window": BLOCK + 40} if family == "mistral" else {}
    model = adapted(tiny_base(family, max_position_embeddings=1024, **window))
    assert_equals_peft(model, random_rows(lengths), scale=0.001)


# Read by other families; a window of more than the 24 tokens of the probe shows in longer rows alone.
FOREIGN = {
    "llama": {"sliding_window": 30, "logits_scaling": 3.0, "residual_multiplier": 0.5, "no_rope_layers": [0, 1, 0]},
    "mistral": {"sliding_window": 30, "layer_types": ["full_attention", "sliding_attention"]},
    "phi3": {"sliding_window": 30, "layer_types": ["full_attention", "sliding_attention"]},
    "qwen3": {"logits_scaling": 3.0, "embedding_multiplier": 2.0},
    "gemma": {"sliding_window": 30, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"sliding_window": 30, "no_rope_layers": [0, 1, 0]},
}


@pytest.mark.parametrize("family", FOREIGN)
def test_fields_that_a_family_does_not_read_change_nothing(family: str) -> None:
    assert_equals_peft(adapted(tiny_base(family, **FOREIGN[family])), random_rows(LENGTHS))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]},
        {"rank_pattern": {"q_proj": 2, "down_proj": 9}, "alpha_pattern": {"k_proj": 1, "gate_proj": 30}},
        {"use_rslora": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_adapters_on_some_modules_and_of_several_ranks_equal_peft(settings: dict[str, Any]) -> None:
    assert_equals_peft(adapted(tiny_base("qwen2"), **settings), random_rows(LENGTHS))


@pytest.mark.parametrize("size", [1, 4, 16])
def test_the_split_into_micro_batches_does_not_change_the_update(size: int) -> None:
    rows = random_rows([9 + 3 * (index % 7) for index in range(16)])
    updates = []
    for rows_at_once in (16, size):
        model = adapted(tiny_base("qwen3", dtype=torch.float64)).double()
        decoder = decode(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for start in range(0, 16, rows_at_once):
            decoder.gradients(pack(rows[start : start + rows_at_once]), 1e-3, None)
        optimizer.step()
        updates.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    for name, whole in updates[0].items():
        torch.testing.assert_close(updates[1][name], whole, atol=1e-10, rtol=0)  # float64


class StreamedDropout(nn.Module):
    """PEFT's dropout with the mask that a row's stream gives next; behind the last attention for labelled tokens alone."""

    def __init__(self, share: float, *, last: bool) -> None:
        super().__init__()
        self.share = share
        self.last = last
        self.source: RowDropout | None = None
        self.chosen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self.source is not None
        assert self.chosen is not None
        mask = torch.ones_like(x[0])
        part = mask[self.chosen] if self.last else mask
        source = self.source.of([len(part)])
        part.view(-1)[source.dropped(x.shape[-1], self.share)] = 0
        if self.last:
            mask[self.chosen] = part
        return x * mask / (1 - self.share)


def test_dropout_is_peft_arithmetic_with_masks_of_seed_step_and_row() -> None:
    model, rows = adapted(tiny_base("qwen2"), dropout=0.25), random_rows(LENGTHS)
    decoder = decode(model)
    packed = pack(rows)
    nats = decoder.gradients(packed, 0.01, RowDropout(7, 5, range(len(rows)), packed.lengths))
    ours = adapter_gradients(model)

    sources = []
    for name, module in model.named_modules():
        if hasattr(module, "lora_dropout"):
            last = ".layers.2." in name and not name.endswith(("q_proj", "k_proj", "v_proj"))
            sources.append(StreamedDropout(0.25, last=last))
            module.lora_dropout["default"] = sources[-1]
    total, reference = 0.0, {}
    for number, row in enumerate(rows):
        stream = RowDropout(7, 5, [number], [len(row.ids)])
        for source in sources:
            source.source, source.chosen = stream, pack([row]).chosen
        row_nats, gradients = reference_gradients(model, [row], 0.01)
        total += row_nats
        reference = {name: reference.get(name, 0) + gradient for name, gradient in gradients.items()}
    assert nats == pytest.approx(total, rel=1e-6)
    assert worst_difference(ours, reference) <= 1e-5


def test_dropout_does_not_depend_on_how_rows_are_packed() -> None:
    rows = random_rows(LENGTHS)
    found = []
    for groups in ([[0, 1, 2, 3, 4]], [[3], [4, 0], [2, 1]]):
        model = adapted(tiny_base("llama"), dropout=0.1)
        decoder = decode(model)
        for group in groups:
            packed = pack([rows[index] for index in group])
            decoder.gradients(packed, 0.01, RowDropout(0, 3, group, packed.lengths))
        found.append(adapter_gradients(model))
    assert worst_difference(found[1], found[0]) <= 1e-5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_dora": True}, r"lora_magnitude_vector.* is trained, which is no low-rank update"),
        ({"modules_to_save": ["norm"]}, "is trained, which is no low-rank update"),
        ({"target_modules": ["q_proj", "lm_head"]}, "the output head is adapted"),
    ],
    ids=["dora", "saved modules", "head"],
)
def test_what_the_decoder_does_not_compute_is_left_to_peft(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotPacked, match=reason):
        read_decoder(adapted(tiny_base("qwen2", tie_word_embeddings=False), **change))


def test_an_unknown_family_is_named() -> None:
    with pytest.raises(NotPacked, match="the family 'olmo2' is not one of llama, mistral"):
        read_decoder(adapted(tiny_base("olmo2")))


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_capped_logits_are_left_to_peft(name: str) -> None:
    with pytest.raises(NotPacked, match=f"the model's own {name} is 30"):
        read_decoder(adapted(tiny_base("gemma3_text", **{name: 30.0})))


def test_a_model_that_computes_something_else_is_found_out() -> None:
    model = adapted(tiny_base("qwen2"))
    layer = model.get_base_model().model.layers[1]
    layer.input_layernorm.register_forward_hook(lambda *_: _[2] * 1.05)
    with pytest.raises(NotPacked, match="on a probe its hidden states differ from transformers' by"):
        checked_decoder(model, 97, "fp32")


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 0.9])
def test_zeros_of_a_mask_are_independent_trials(share: float) -> None:
    size = 200_000
    positions = bernoulli_positions(np.random.Generator(np.random.SFC64(4)), size, share)
    assert (np.diff(positions) > 0).all()
    assert positions[0] >= 0
    assert positions[-1] < size
    deviation = math.sqrt(size * share * (1 - share))
    assert abs(len(positions) - size * share) < 5 * deviation  # binomial
    both = np.isin(positions + 1, positions).sum()  # neighbours fail together with probability share²
    assert abs(both - size * share**2) < 6 * math.sqrt(size * share**2)


def test_a_nearly_certain_target_keeps_its_loss_and_gradient_in_bf16() -> None:
    logits = torch.zeros(1, 50)
    logits[0, 3] = 11.0
    exact = logits.double().log_softmax(-1)
    gradient, nats = target_softmax(logits.bfloat16(), torch.tensor([3]))
    assert nats == pytest.approx(-exact[0, 3].item(), rel=0.01)  # 8e-4, where bf16 rounds the probability to 1
    assert gradient[0, 3].item() == pytest.approx(exact[0, 3].exp().item() - 1, rel=0.01)
    assert abs(gradient.sum().item()) < 1e-5
