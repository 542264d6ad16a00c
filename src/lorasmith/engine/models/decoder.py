"""Forward and backward of a decoder over packed rows, written out: the gradient reaches adapters alone.

Frozen weights need no gradient and a layer's structure is known, so each tensor that the backward pass reads is named
here, lies in a workspace, and is overwritten by its own gradient where it is read for the last time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lorasmith.engine.lora.dropout import Dropout, RecordedDropout
from lorasmith.engine.lora.group import Saved
from lorasmith.engine.models.attention import attend, attend_backward, kept_size
from lorasmith.engine.models.elementwise import gate, gate_backward, rms_norm, rms_norm_backward, rotate, wide
from lorasmith.engine.models.families import Decoder, Layer
from lorasmith.engine.models.head import cross_entropy, cross_entropy_with_gradient
from lorasmith.engine.models.packing import PackedRows
from lorasmith.engine.models.workspace import Workspace

SPARE = "spare"  # one set of buffers for every layer whose tensors nobody reads again


@dataclass
class LayerSaved:
    """Tensors of one layer's forward pass that its backward pass reads; `x` and `middle` are the residual stream."""

    x: Tensor
    first_inverse: Tensor
    qkv: Saved
    joined: Tensor
    q: Tensor
    k: Tensor
    inverses: tuple[Tensor | None, Tensor | None]
    probabilities: Tensor
    out: Saved
    middle: Tensor
    second_inverse: Tensor
    gate_up: Saved
    gates_ups: Tensor
    down: Saved


class PackedDecoder:
    """Loss and adapter gradients of packed rows.

    With `recompute` a layer keeps only its input and is computed again in the backward pass: a third more products, and
    the memory of one layer instead of all (gradient checkpointing, https://arxiv.org/abs/1604.06174).
    """

    def __init__(self, decoder: Decoder, *, recompute: bool = False) -> None:
        self.decoder = decoder
        self.recompute = recompute
        self.workspace = Workspace(decoder.dtype)
        self.lowest = next((number for number, layer in enumerate(decoder.layers) if layer.trained), 0)

    @torch.no_grad()
    def loss(self, rows: PackedRows) -> float:
        """Sum of the loss in nats over the trained tokens."""
        hidden = self.normalised(self.forward(rows, self.positions(rows), None, None), rows)[0]
        return cross_entropy(hidden, rows.targets, self.decoder.head, self.workspace)

    @torch.no_grad()
    def gradients(self, rows: PackedRows, scale: float, dropout: Dropout | None) -> float:
        """Add the gradient of `scale` times the summed loss to the adapters' `.grad`; returns the sum in nats."""
        saved: list[Callable[[], LayerSaved]] = []
        positions = self.positions(rows)
        last = self.forward(rows, positions, dropout, saved)
        hidden, chosen, inverse = self.normalised(last, rows)
        nats, gradient = cross_entropy_with_gradient(hidden, rows.targets, self.decoder.head, scale, self.workspace)
        dx = self.workspace.take("gradient", *last.shape).zero_()
        dx[rows.labelled] = rms_norm_backward(chosen, self.decoder.final_norm, inverse, gradient).to(dx.dtype)
        for number in reversed(range(self.lowest, len(self.decoder.layers))):
            self.layer_backward(self.decoder.layers[number], saved.pop()(), rows, positions, dx, number > self.lowest)
        return nats

    @torch.no_grad()
    def hidden(self, rows: PackedRows) -> Tensor:
        """The residual stream (T, H) behind the last layer, before the final norm."""
        return self.forward(rows, self.positions(rows), None, None)

    def normalised(self, last: Tensor, rows: PackedRows) -> tuple[Tensor, Tensor, Tensor]:
        """Behind the final norm and before it, at the labelled positions alone (n, H), and the inverse norms."""
        chosen = last[rows.labelled]
        hidden, inverse = torch.empty_like(chosen), chosen.new_empty(len(chosen), 1, dtype=wide(chosen.dtype))
        rms_norm(chosen, self.decoder.final_norm, self.decoder.eps, hidden, inverse)
        return hidden, chosen, inverse

    def forward(
        self,
        rows: PackedRows,
        positions: tuple[Tensor, Tensor],
        dropout: Dropout | None,
        saved: list[Callable[[], LayerSaved]] | None,
    ) -> Tensor:
        """Residual stream (T, H) behind the last layer.

        `saved` takes, for each layer that the backward pass reaches, how to get what that pass reads.
        """
        decoder = self.decoder
        for group in decoder.groups:
            group.refresh(decoder.dtype)
        x = decoder.embedding[rows.ids]
        if decoder.embedding_scale != 1:
            x *= torch.tensor(decoder.embedding_scale, dtype=decoder.dtype)  # rounded first, as the family does
        for number, layer in enumerate(decoder.layers):
            if saved is None or number < self.lowest:
                x, _ = self.layer_forward(layer, x, rows, positions, dropout, SPARE)
            elif self.recompute:
                stream = self.workspace.take(f"stream.{number}", *x.shape).copy_(x)
                recorded = RecordedDropout(dropout) if dropout else None
                x, _ = self.layer_forward(layer, x, rows, positions, recorded, SPARE)
                saved.append(partial(self.again, layer, stream, rows, positions, recorded))
            else:
                x, kept = self.layer_forward(layer, x, rows, positions, dropout, str(number))
                saved.append(partial(returned, kept))
        return x

    def again(
        self,
        layer: Layer,
        x: Tensor,
        rows: PackedRows,
        positions: tuple[Tensor, Tensor],
        recorded: RecordedDropout | None,
    ) -> LayerSaved:
        return self.layer_forward(layer, x, rows, positions, recorded.replay() if recorded else None, SPARE)[1]

    def positions(self, rows: PackedRows) -> tuple[Tensor, Tensor]:
        """Cosines and sines (T, 1, half), of each row as if it were alone: some families scale by a row's length."""
        parts = [
            self.decoder.rotary(torch.empty(0, dtype=wide(self.decoder.dtype)), torch.arange(length)[None])
            for length in rows.lengths
        ]
        half = parts[0][0].shape[-1] // 2
        cosine, sine = (torch.cat([part[which][0, :, :half] for part in parts])[:, None] for which in (0, 1))
        return cosine, sine

    def layer_forward(
        self,
        layer: Layer,
        x: Tensor,
        rows: PackedRows,
        positions: tuple[Tensor, Tensor],
        dropout: Dropout | None,
        tag: str,
    ) -> tuple[Tensor, LayerSaved]:
        tokens, heads, workspace = len(x), layer.heads, self.workspace
        cosine, sine = positions

        normal, first_inverse = self.norm(x, layer.first_norm, f"first.{tag}")
        joined, qkv = layer.qkv.forward(normal, dropout, workspace, tag)
        raw_q, raw_k, v = self.split(layer, joined)
        inverses: tuple[Tensor | None, Tensor | None] = (None, None)
        if layer.query_norm is not None and layer.key_norm is not None:
            raw_q, query_inverse = self.head_norm(raw_q, layer.query_norm, f"query.{tag}")
            raw_k, key_inverse = self.head_norm(raw_k, layer.key_norm, f"key.{tag}")
            inverses = (query_inverse, key_inverse)
        q = workspace.take(f"q.{tag}", heads.key_heads, tokens, heads.group, heads.head_dim)
        k = workspace.take(f"k.{tag}", heads.key_heads, tokens, heads.head_dim)
        # Scores are scaled here, in fp32, and not on their square.
        rotate(raw_q, cosine * layer.scale, sine * layer.scale, q, pass_scale=layer.scale)
        rotate(raw_k, cosine, sine, k.unsqueeze(2))
        probabilities = workspace.take(f"probabilities.{tag}", kept_size(rows.segments, heads))
        mixed = workspace.take(f"mixed.{tag}", tokens, heads.query_width)
        by_head = mixed.view(tokens, heads.key_heads, heads.group, heads.head_dim).transpose(0, 1)
        attend(q, k, v, rows.segments, heads, by_head, probabilities, workspace)
        # The residual is added last: added to W o first, a small update would be rounded away at the residual's scale.
        middle, out = layer.out.forward(mixed, dropout, workspace, tag)
        middle += x

        normal, second_inverse = self.norm(middle, layer.second_norm, f"second.{tag}")
        gates_ups, gate_up = layer.gate_up.forward(normal, dropout, workspace, tag)
        gates, ups = gates_ups.chunk(2, dim=1)
        active = workspace.take("active", *gates.shape)
        gate(self.decoder.activation, gates, ups, active)
        last, down = layer.down.forward(active, dropout, workspace, tag)
        last += middle
        return last, LayerSaved(
            x=x,
            first_inverse=first_inverse,
            qkv=qkv,
            joined=joined,
            q=q,
            k=k,
            inverses=inverses,
            probabilities=probabilities,
            out=out,
            middle=middle,
            second_inverse=second_inverse,
            gate_up=gate_up,
            gates_ups=gates_ups,
            down=down,
        )

    def layer_backward(
        self,
        layer: Layer,
        saved: LayerSaved,
        rows: PackedRows,
        positions: tuple[Tensor, Tensor],
        dx: Tensor,
        through: bool,
    ) -> None:
        """Turn `dx`, the gradient of the layer's output, into that of its input; in place, unless nothing below needs it."""
        workspace, heads = self.workspace, layer.heads

        gates, ups = saved.gates_ups.chunk(2, dim=1)
        saved.down.x = workspace.take("active", *gates.shape)  # computed again: a third of a layer's memory
        dactive, reduced = layer.down.backward_input(dx, saved.down, workspace)
        assert dactive is not None
        gate_backward(self.decoder.activation, dactive, gates, ups, saved.down.x)
        layer.down.backward_down(reduced, saved.down, workspace)
        dnormal = layer.gate_up.backward(saved.gates_ups, saved.gate_up, workspace)
        assert dnormal is not None
        dx += rms_norm_backward(saved.middle, layer.second_norm, saved.second_inverse, dnormal)

        dmixed = layer.out.backward(dx, saved.out, workspace)
        assert dmixed is not None
        tokens = len(dmixed)
        by_head = dmixed.view(tokens, heads.key_heads, heads.group, heads.head_dim).transpose(0, 1)
        raw_q, raw_k, v = self.split(layer, saved.joined)
        dq, dk, dv = attend_backward(by_head, saved.q, saved.k, v, rows.segments, heads, saved.probabilities, workspace)
        v.copy_(dv)
        cosine, sine = positions
        self.rotate_back(
            dq, cosine * layer.scale, -sine * layer.scale, raw_q, layer.query_norm, saved.inverses[0], layer.scale
        )
        self.rotate_back(dk.unsqueeze(2), cosine, -sine, raw_k, layer.key_norm, saved.inverses[1], 1.0)
        dnormal = layer.qkv.backward(saved.joined, saved.qkv, workspace, through=through)
        if dnormal is not None:
            dx += rms_norm_backward(saved.x, layer.first_norm, saved.first_inverse, dnormal)

    def norm(self, x: Tensor, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        normal = self.workspace.take(f"normal.{name}", *x.shape)
        inverse = self.workspace.take(f"inverse.{name}", len(x), 1, dtype=wide(x.dtype))
        rms_norm(x, weight, self.decoder.eps, normal, inverse)
        return normal, inverse

    def head_norm(self, x: Tensor, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """RMS norm over head_dim of (key_heads, T, group, head_dim)."""
        inverse = self.workspace.take(f"inverse.{name}", *x.shape[:-1], 1, dtype=wide(x.dtype))
        normal = self.workspace.take(f"normal.{name.partition('.')[0]}", *x.shape)
        rms_norm(x, weight, self.decoder.eps, normal, inverse)
        return normal, inverse

    def split(self, layer: Layer, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of q (key_heads, T, group, head_dim), k (key_heads, T, 1, head_dim) and v (key_heads, T, head_dim)."""
        heads, tokens = layer.heads, len(joined)
        q, k, v = joined.split([heads.query_width, heads.key_width, heads.key_width], dim=1)
        return (
            q.view(tokens, heads.key_heads, heads.group, heads.head_dim).transpose(0, 1),
            k.view(tokens, heads.key_heads, 1, heads.head_dim).transpose(0, 1),
            v.view(tokens, heads.key_heads, heads.head_dim).transpose(0, 1),
        )

    def rotate_back(
        self,
        gradient: Tensor,
        cosine: Tensor,
        sine: Tensor,
        raw: Tensor,
        weight: Tensor | None,
        inverse: Tensor | None,
        pass_scale: float,
    ) -> None:
        """Put the gradient of the unrotated, unnormalised heads into the place of `raw`."""
        if weight is None or inverse is None:
            rotate(gradient, cosine, sine, raw, pass_scale=pass_scale)
            return
        back = self.workspace.take("unrotated", *gradient.shape)
        rotate(gradient, cosine, sine, back, pass_scale=pass_scale)
        raw.copy_(rms_norm_backward(raw, weight, inverse, back))


def returned(kept: LayerSaved) -> LayerSaved:
    return kept
