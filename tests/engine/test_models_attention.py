"""Attention by torch's fused kernels, which a GPU takes, against attention by blocks, which a CPU takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lorasmith.engine.models import fused_attention
from lorasmith.engine.models.attention import BLOCK, BY_BLOCKS, KEPT_TOKENS, Attention, Heads
from lorasmith.engine.models.fused_attention import FUSED
from lorasmith.engine.models.packing import Segment
from lorasmith.engine.models.workspace import Workspace
from tests.engine.decoder_cases import (
    FAMILIES,
    LENGTHS,
    adapted,
    assert_equals_peft,
    random_rows,
    tiny_base,
    worst_difference,
)

ROWS = [Segment(0, 70), Segment(70, 1), Segment(71, 33)]
LONG_ROWS = [Segment(0, KEPT_TOKENS + 90), Segment(KEPT_TOKENS + 90, BLOCK + 1)]
BEGINNING, MORE = slice(0, 32), slice(32, 48)
SHARED = [
    Segment(0, 32),
    Segment(32, 16, (BEGINNING,)),
    Segment(48, 20, (BEGINNING, MORE)),
    Segment(68, 1, (BEGINNING, MORE)),
    Segment(69, 40, (BEGINNING,)),
    Segment(109, 25),
]


def attended(attention: Attention, segments: list[Segment], heads: Heads) -> dict[str, Tensor]:
    """What it makes of random heads, and the gradients of random gradients."""
    generator, tokens = torch.Generator().manual_seed(6), segments[-1].start + segments[-1].length
    q, out, gradient = (
        torch.randn(heads.key_heads, tokens, heads.group, heads.head_dim, generator=generator) for _ in range(3)
    )
    k, v = (torch.randn(heads.key_heads, tokens, heads.head_dim, generator=generator) for _ in range(2))
    workspace = Workspace(torch.float32)
    kept = torch.empty(attention.kept_size(segments, heads, KEPT_TOKENS))
    attention.attend(q * 0.2, k, v, segments, heads, out, kept, KEPT_TOKENS, workspace)
    gradients = attention.attend_backward(gradient, q * 0.2, k, v, segments, heads, kept, KEPT_TOKENS, workspace)
    return dict(zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True))


@pytest.mark.parametrize("heads", [Heads(2, 1, 16, None), Heads(2, 3, 8, None)], ids=["own keys", "grouped"])
@pytest.mark.parametrize("window", [None, 2, 20, 300], ids=lambda window: f"window {window}")
@pytest.mark.parametrize("segments", [ROWS, LONG_ROWS, SHARED], ids=["rows", "long rows", "shared beginnings"])
def test_the_fused_kernels_compute_what_the_blocks_compute(
    segments: list[Segment], window: int | None, heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_attention, "WINDOW_QUERIES", 64)  # so that a long row is several blocks of them
    heads = replace(heads, window=window)
    expected, ours = attended(BY_BLOCKS, segments, heads), attended(FUSED, segments, heads)
    assert worst_difference(ours, expected) <= 1e-5  # fp32, sums of up to 602 products


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_with_the_fused_kernels_has_the_gradients_of_peft(family: str) -> None:
    rows = random_rows(LENGTHS)
    rows[2] = replace(rows[2], ids=[*rows[0].ids[:25], *rows[2].ids[25:]])
    assert_equals_peft(adapted(tiny_base(family)), rows, share=True, attention=FUSED)
