"""Causal attention over packed rows by torch's fused kernels, each row for itself: what a GPU takes.

Nothing is kept for the gradient: the kernel runs once more under autograd, which is cheap beside the products of a layer.
A row alone is causal, which FlashAttention knows (https://arxiv.org/abs/2205.14135). Where queries follow a shared beginning
or see only a window, a mask says so, and torch takes another of its kernels.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lorasmith.engine.models.attention import (
    Attention,
    Block,
    Heads,
    blocks,
    gathered,
    queries_of,
    seen_by_each,
    visible,
)
from lorasmith.engine.models.packing import Segment
from lorasmith.engine.models.workspace import Workspace

WINDOW_QUERIES = 1024  # at a time, where a window leaves most keys of a long row unseen
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def keeps_nothing(segments: list[Segment], heads: Heads, kept_tokens: int) -> int:
    return 0


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: list[Segment],
    heads: Heads,
    out: Tensor,
    kept: Tensor,
    kept_tokens: int,
    workspace: Workspace,
) -> None:
    """As `attention.attend`; `kept` is not used."""
    for segment in segments:
        keys, values = gathered(k, segment, workspace, "keys"), gathered(v, segment, workspace, "values")
        for block in parts(segment, heads):
            queries, seen = queries_of(segment, block), slice(block.seen, block.last)
            with sdpa_kernel(KERNELS):
                out[:, queries] = fused(q[:, queries], keys[:, seen], values[:, seen], block, heads)


def attend_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: list[Segment],
    heads: Heads,
    kept: Tensor,
    kept_tokens: int,
    workspace: Workspace,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes."""
    dq = workspace.take("dq", *q.shape)
    dk = workspace.take("dk", *k.shape).zero_()
    dv = workspace.take("dv", *k.shape).zero_()
    for segment, keys, values, dkeys, dvalues in seen_by_each(k, v, dk, dv, segments, workspace):
        for block in parts(segment, heads):
            queries, seen = queries_of(segment, block), slice(block.seen, block.last)
            inputs = [part.detach().requires_grad_() for part in (q[:, queries], keys[:, seen], values[:, seen])]
            with torch.enable_grad(), sdpa_kernel(KERNELS):
                mixed = fused(inputs[0], inputs[1], inputs[2], block, heads)
            found = torch.autograd.grad(mixed, inputs, gradient[:, queries])
            dq[:, queries] = found[0]
            dkeys[:, seen] += found[1]
            dvalues[:, seen] += found[2]
    return dq, dk, dv


def parts(segment: Segment, heads: Heads) -> Iterator[Block]:
    """A segment whole, or in blocks where a window does not reach back to its row's beginning."""
    end = segment.offset + segment.length
    whole = heads.window is None or end <= heads.window
    yield from blocks(segment, None if whole else heads.window, segment.length if whole else WINDOW_QUERIES)


def fused(q: Tensor, keys: Tensor, values: Tensor, block: Block, heads: Heads) -> Tensor:
    """softmax(q k^T + mask) v like q (key_heads, queries, group, head_dim), over keys and values (key_heads, keys, head_dim)."""
    count, width = block.last - block.first, block.last - block.seen
    all_within = heads.window is None or width <= heads.window
    is_causal = count == width and all_within  # torch's flag aligns the first query with the first key
    mask = None if is_causal else visible(block, None if all_within else heads.window, q.device)
    mixed = F.scaled_dot_product_attention(
        q.transpose(1, 2),  # (key_heads, group, queries, head_dim)
        for_each_query_head(keys, heads),
        for_each_query_head(values, heads),
        attn_mask=mask,
        is_causal=is_causal,
        scale=1.0,  # queries are scaled already
    )
    return mixed.transpose(1, 2)


def for_each_query_head(x: Tensor, heads: Heads) -> Tensor:
    """(key_heads, group, keys, head_dim); copied, as not every kernel takes heads that are the same memory."""
    x = x.unsqueeze(1)
    return x if heads.group == 1 else x.expand(-1, heads.group, -1, -1).contiguous()


FUSED = Attention(keeps_nothing, attend, attend_backward)
