"""The packed decoder in bf16: how far it is from fp32, by the distance of PEFT under bf16 autocast.

The truth is PEFT in fp32 on the same weights, rounded to bf16 before, row by row without packing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.models.attention import BLOCK, KEPT_TOKENS
from lorasmith.engine.models.decoder import PackedDecoder
from lorasmith.engine.models.families import pack_weights
from lorasmith.engine.models.packing import pack
from lorasmith.engine.training.checkpoints import trainable
from lorasmith.engine.training.computation import checked_decoder
from tests.engine.decoder_cases import (
    FAMILIES,
    LENGTHS,
    adapter_gradients,
    distances,
    fp32_and_autocast,
    random_rows,
    rounded_model,
)

MORE_LENGTHS = [*LENGTHS, 40, 25, 50, 12, 45, 30, 22]
AS_FAR_AS_PEFT = 2.0  # both are rounding, and vary by about half from one set of rows to another


def packed_decoder(model: PeftModel, *, packed: bool) -> PackedDecoder:
    decoder = checked_decoder(model, 97, "bf16")
    if packed:
        pack_weights(decoder, model)
    assert set(decoder.paths.values()) == {"packed" if packed else "plain"}
    return PackedDecoder(decoder)


def assert_as_near_as_peft(rows: list[RenderedExample], family: str, **changes: Any) -> None:
    _, truth, bounds = fp32_and_autocast(family, rows, **changes)
    for packed in (False, True):
        model = rounded_model(family, torch.bfloat16, **changes)
        packed_decoder(model, packed=packed).gradients(pack(rows), 0.01, None)
        ours = adapter_gradients(model)
        assert {tensor.dtype for tensor in [*ours.values(), *trainable(model).values()]} == {torch.float32}
        for distance, bound in zip(distances(ours, truth), bounds, strict=True):
            assert 1e-4 < distance <= AS_FAR_AS_PEFT * bound  # bf16 has 8 bits: what is nearer is not bf16


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_as_near_as_pefts_under_autocast(family: str) -> None:
    assert_as_near_as_peft(random_rows(LENGTHS), family)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_gradients_of_rows_of_several_blocks_are_as_near_as_pefts(family: str) -> None:
    window = {"sliding_window": BLOCK + 40} if family == "mistral" else {}
    rows = random_rows([KEPT_TOKENS + 90, BLOCK + 1, 5])
    assert_as_near_as_peft(rows, family, max_position_embeddings=1024, **window)


@torch.no_grad()
def row_losses(model: PeftModel, rows: list[RenderedExample]) -> torch.Tensor:
    """Mean loss of each row in nats, by PEFT and transformers."""
    losses = []
    for row in rows:
        ids, chosen = torch.tensor([row.ids]), torch.tensor(row.trained[1:])
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1][chosen]
        losses.append(F.cross_entropy(logits.float(), ids[0, 1:][chosen]).item())
    return torch.tensor(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_as_near_as_pefts_under_autocast(family: str) -> None:
    rows = [*random_rows(MORE_LENGTHS), *random_rows(MORE_LENGTHS, seed=4)]
    truth = row_losses(rounded_model(family, torch.float32), rows)
    with torch.autocast("cpu", torch.bfloat16):
        peft = row_losses(rounded_model(family, torch.bfloat16), rows)
    decoder = packed_decoder(rounded_model(family, torch.bfloat16), packed=False)
    ours = torch.tensor([decoder.loss(pack([row])) / row.trained_tokens for row in rows])
    distance, bound = ((losses - truth).square().mean().sqrt().item() for losses in (ours, peft))
    assert 0 < distance <= AS_FAR_AS_PEFT * bound
