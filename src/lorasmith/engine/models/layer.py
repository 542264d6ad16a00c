"""Forward and backward of one decoder layer over packed rows, written out.

Each tensor that the backward pass reads is named here, lies in a workspace, and is overwritten by its own gradient where
it is read for the last time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorasmith.engine.lora.dropout import Dropout
from lorasmith.engine.lora.group import Saved
from lorasmith.engine.models.attention import Attention
from lorasmith.engine.models.elementwise import Elementwise, rms_norm_backward, wide
from lorasmith.engine.models.families import Layer
from lorasmith.engine.models.packing import Segment
from lorasmith.engine.models.workspace import Workspace


@dataclass(frozen=True)
class Pass:
    """What every layer of one pass reads.

    `turns` are cosines and sines (T, 1, half) of each token's position in its row, as layers name them, `chosen_lengths` how
    many chosen tokens each row has. The attention weights of rows of up to `kept_tokens` are kept for the gradient.
    """

    segments: list[Segment]
    chosen_lengths: list[int]
    turns: dict[str | None, tuple[Tensor, Tensor]]
    dropout: Dropout | None
    workspace: Workspace
    eps: float
    activation: str
    elementwise: Elementwise
    attention: Attention
    kept_tokens: int


@dataclass
class LayerSaved:
    """Tensors of a forward pass that the backward pass reads; `x` and `middle` are the residual stream.

    What few operations make of them (norms, rotated heads, the activation) is made again: it would be a third of the memory.
    `branches` are what attention and MLP gave, where each is normalised before it joins the stream.
    `chosen` (n,) are the tokens whose output is needed; behind attention only they are computed. None: all of them.
    """

    x: Tensor
    chosen: Tensor | None
    qkv: Saved
    joined: Tensor
    probabilities: Tensor
    out: Saved
    middle: Tensor
    gate_up: Saved
    gates_ups: Tensor
    branches: tuple[Tensor | None, Tensor | None]
    down: Saved | None = None


def layer_forward(layer: Layer, x: Tensor, state: Pass, tag: str, chosen: Tensor | None) -> tuple[Tensor, LayerSaved]:
    """The layer's output (T, H), or (n, H) of the chosen tokens; `tag` keeps the tensors of layers apart."""
    saved, dropout = forward_to_gates(layer, x, state, tag, chosen)
    gates, ups = saved.gates_ups.chunk(2, dim=1)
    active = state.workspace.take("active", *gates.shape)
    state.elementwise.gate(state.activation, gates, ups, active)
    branch, saved.down = layer.down.forward(active, dropout, state.workspace, tag)
    last, kept = join(layer, 1, branch, saved.middle, state, tag)
    saved.branches = saved.branches[0], kept
    return last, saved


def forward_to_gates(
    layer: Layer, x: Tensor, state: Pass, tag: str, chosen: Tensor | None
) -> tuple[LayerSaved, Dropout | None]:
    """What the backward pass reads, all but `down`, and the dropout of what comes behind."""
    tokens, heads, workspace = len(x), layer.heads, state.workspace
    stream = x

    normal, _ = norm(x, layer.first_norm, state)
    joined, qkv = layer.qkv.forward(normal, state.dropout, workspace, tag)
    turned = rotated(layer, joined, state)
    kept = state.attention.kept_size(state.segments, heads, state.kept_tokens)
    probabilities = workspace.take(f"probabilities.{tag}", kept)
    mixed = workspace.take(f"mixed.{tag}", tokens, heads.query_width)
    by_head = mixed.view(tokens, heads.key_heads, heads.group, heads.head_dim).transpose(0, 1)
    v = split(layer, joined)[2]
    state.attention.attend(
        turned.q, turned.k, v, state.segments, heads, by_head, probabilities, state.kept_tokens, workspace
    )

    dropout = state.dropout
    if chosen is not None:
        mixed, x = mixed[chosen], x[chosen]
        dropout = dropout.of(state.chosen_lengths) if dropout else None
    branch, out = layer.out.forward(mixed, dropout, workspace, tag)
    middle, kept_branch = join(layer, 0, branch, x, state, tag)
    normal, _ = norm(middle, layer.second_norm, state)
    gates_ups, gate_up = layer.gate_up.forward(normal, dropout, workspace, tag)
    saved = LayerSaved(
        x=stream,
        chosen=chosen,
        qkv=qkv,
        joined=joined,
        probabilities=probabilities,
        out=out,
        middle=middle,
        gate_up=gate_up,
        gates_ups=gates_ups,
        branches=(kept_branch, None),
    )
    return saved, dropout


def join(
    layer: Layer, which: int, branch: Tensor, stream: Tensor, state: Pass, tag: str
) -> tuple[Tensor, Tensor | None]:
    """The stream behind attention (0) or the MLP (1), and what of the branch the backward pass reads.

    The stream is added last: added to W o first, a small update would be rounded away at its scale.
    """
    if layer.branch_norms is None:
        if layer.branch_scale != 1:
            branch *= layer.branch_scale
        return branch.add_(stream), None
    joined = state.workspace.take(f"joined.{which}.{tag}", *branch.shape)
    inverse = state.workspace.take("inverse", len(branch), 1, dtype=wide(branch.dtype))
    state.elementwise.rms_norm(branch, layer.branch_norms[which], state.eps, joined, inverse)
    return joined.add_(stream), branch


def branch_gradient(layer: Layer, which: int, saved: LayerSaved, state: Pass, dx: Tensor) -> Tensor:
    """The gradient of what attention (0) or the MLP (1) gave, from that of the stream behind it, which stays."""
    branch = saved.branches[which]
    if layer.branch_norms is None or branch is None:
        if layer.branch_scale == 1:
            return dx
        return torch.mul(dx, layer.branch_scale, out=state.workspace.take("branch", *dx.shape))
    weight = layer.branch_norms[which]
    _, inverse = norm(branch, weight, state)
    gradient = state.workspace.take("branch", *dx.shape).zero_()
    state.elementwise.add_rms_norm_backward(branch, weight, inverse, dx, gradient)
    return gradient


def layer_backward(layer: Layer, saved: LayerSaved, state: Pass, dx: Tensor, *, through: bool) -> Tensor:
    """The gradient (T, H) of the layer's input from that of its output, `dx`, which is overwritten.

    Without `through` nothing below needs it, and what comes back means nothing.
    """
    workspace, heads = state.workspace, layer.heads

    assert saved.down is not None
    gates, ups = saved.gates_ups.chunk(2, dim=1)
    saved.down.x = workspace.take("active", *gates.shape)
    dactive, reduced = layer.down.backward_input(branch_gradient(layer, 1, saved, state, dx), saved.down, workspace)
    assert dactive is not None
    state.elementwise.gate_backward(state.activation, dactive, gates, ups, saved.down.x)
    layer.down.backward_down(reduced, saved.down, workspace)
    saved.gate_up.x, inverse = norm(saved.middle, layer.second_norm, state)
    dnormal = layer.gate_up.backward(saved.gates_ups, saved.gate_up, workspace)
    assert dnormal is not None
    add_norm_backward = state.elementwise.add_rms_norm_backward
    add_norm_backward(saved.middle, layer.second_norm, inverse, dnormal, dx)
    dmixed = layer.out.backward(branch_gradient(layer, 0, saved, state, dx), saved.out, workspace)
    assert dmixed is not None
    if saved.chosen is not None:
        dx = spread(dx, saved.chosen, workspace.take("spread.x", *saved.x.shape))
        dmixed = spread(dmixed, saved.chosen, workspace.take("spread.mixed", len(saved.x), heads.query_width))

    tokens = len(dmixed)
    by_head = dmixed.view(tokens, heads.key_heads, heads.group, heads.head_dim).transpose(0, 1)
    raw_q, raw_k, v = split(layer, saved.joined)
    turned = rotated(layer, saved.joined, state)
    dq, dk, dv = state.attention.attend_backward(
        by_head,
        turned.q,
        turned.k,
        v,
        state.segments,
        heads,
        saved.probabilities,
        state.kept_tokens,
        workspace,
    )
    v.copy_(dv)
    rotate_back(dq, raw_q, layer, state, layer.scale, layer.query_norm, turned.query_inverse)
    rotate_back(dk.unsqueeze(2), raw_k, layer, state, 1.0, layer.key_norm, turned.key_inverse)
    saved.qkv.x, inverse = norm(saved.x, layer.first_norm, state)
    dnormal = layer.qkv.backward(saved.joined, saved.qkv, workspace, through=through)
    if dnormal is not None:
        add_norm_backward(saved.x, layer.first_norm, inverse, dnormal, dx)
    return dx


def spread(gradient: Tensor, chosen: Tensor, out: Tensor) -> Tensor:
    """The gradient (n, width) of chosen tokens among all (T, width): the others had no part in the loss."""
    return out.zero_().index_copy_(0, chosen, gradient)


def norm(x: Tensor, weight: Tensor, state: Pass) -> tuple[Tensor, Tensor]:
    """Of the residual stream, in buffers that the next call overwrites."""
    normal = state.workspace.take("normal", *x.shape)
    inverse = state.workspace.take("inverse", len(x), 1, dtype=wide(x.dtype))
    state.elementwise.rms_norm(x, weight, state.eps, normal, inverse)
    return normal, inverse


@dataclass
class Rotated:
    """Queries (key_heads, T, group, head_dim), scaled, and keys (key_heads, T, head_dim) at their positions.

    The inverse norms are those of the families that normalise each head first.
    """

    q: Tensor
    k: Tensor
    query_inverse: Tensor | None = None
    key_inverse: Tensor | None = None


def rotated(layer: Layer, joined: Tensor, state: Pass) -> Rotated:
    """In buffers that the next call overwrites."""
    heads, workspace, elementwise = layer.heads, state.workspace, state.elementwise
    raw_q, raw_k, _ = split(layer, joined)
    made = Rotated(
        q=workspace.take("q", heads.key_heads, len(joined), heads.group, heads.head_dim),
        k=workspace.take("k", heads.key_heads, len(joined), heads.head_dim),
    )
    if layer.query_norm is not None and layer.key_norm is not None:
        raw_q, made.query_inverse = head_norm(raw_q, layer.query_norm, state, "query")
        raw_k, made.key_inverse = head_norm(raw_k, layer.key_norm, state, "key")
    cosine, sine = state.turns[layer.positions]
    # Scores are scaled here, in fp32, and not on their square.
    elementwise.rotate(raw_q, cosine * layer.scale, sine * layer.scale, made.q, pass_scale=layer.scale)
    elementwise.rotate(raw_k, cosine, sine, made.k.unsqueeze(2))
    return made


def head_norm(x: Tensor, weight: Tensor, state: Pass, name: str) -> tuple[Tensor, Tensor]:
    """RMS norm over head_dim of (key_heads, T, group, head_dim)."""
    inverse = state.workspace.take(f"inverse.{name}", *x.shape[:-1], 1, dtype=wide(x.dtype))
    normal = state.workspace.take(f"normal.{name}", *x.shape)
    state.elementwise.rms_norm(x, weight, state.eps, normal, inverse)
    return normal, inverse


def split(layer: Layer, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q (key_heads, T, group, head_dim), k (key_heads, T, 1, head_dim) and v (key_heads, T, head_dim)."""
    heads, tokens = layer.heads, len(joined)
    q, k, v = joined.split([heads.query_width, heads.key_width, heads.key_width], dim=1)
    return (
        q.view(tokens, heads.key_heads, heads.group, heads.head_dim).transpose(0, 1),
        k.view(tokens, heads.key_heads, 1, heads.head_dim).transpose(0, 1),
        v.view(tokens, heads.key_heads, heads.head_dim).transpose(0, 1),
    )


def rotate_back(
    gradient: Tensor,
    raw: Tensor,
    layer: Layer,
    state: Pass,
    scale: float,
    weight: Tensor | None,
    inverse: Tensor | None,
) -> None:
    """Put the gradient of the unrotated, unnormalised heads into the place of `raw`."""
    cosine, sine = state.turns[layer.positions]
    cosine, sine = cosine * scale, -sine * scale
    if weight is None or inverse is None:
        state.elementwise.rotate(gradient, cosine, sine, raw, pass_scale=scale)
        return
    back = state.workspace.take("unrotated", *gradient.shape)
    state.elementwise.rotate(gradient, cosine, sine, back, pass_scale=scale)
    raw.copy_(rms_norm_backward(raw, weight, inverse, back))
