"""Loss and gradients of a decoder over packed rows. The gradient reaches adapters alone, so nothing else is kept for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from lorasmith.engine.lora.dropout import Dropout, RecordedDropout
from lorasmith.engine.lora.frozen import IntegerMatrix
from lorasmith.engine.lora.group import Saved
from lorasmith.engine.models.attention import BY_BLOCKS, KEPT_TOKENS, Attention
from lorasmith.engine.models.elementwise import EAGER, Elementwise, rms_norm, rms_norm_backward, wide
from lorasmith.engine.models.families import Decoder, Layer
from lorasmith.engine.models.fused_attention import FUSED
from lorasmith.engine.models.head import CHUNK, LARGE_CHUNK, LEAST_CHUNK, cross_entropy, cross_entropy_with_gradient
from lorasmith.engine.models.layer import LayerSaved, Pass, forward_to_gates, layer_backward, layer_forward
from lorasmith.engine.models.packing import PackedRows, Segment
from lorasmith.engine.models.workspace import Workspace

SPARE = "spare"  # one set of buffers for every layer whose tensors nobody reads again


class PackedDecoder:
    """Loss and adapter gradients of packed rows, on the device of the weights.

    With `recompute` a layer keeps only its input and is computed again in the backward pass, but for its last product, whose
    output nothing reads: a third more products, and the memory of one layer instead of all (gradient checkpointing,
    https://arxiv.org/abs/1604.06174). A `lean` one keeps
    no attention weights, which are a quarter of what a layer keeps for rows of 300 tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        recompute: bool = False,
        lean: bool = False,
        elementwise: Elementwise = EAGER,
        attention: Attention | None = None,
    ) -> None:
        """`attention` is otherwise what suits the device."""
        self.decoder = decoder
        self.device = decoder.device
        self.attention = attention or (BY_BLOCKS if self.device.type == "cpu" else FUSED)
        self.kept_tokens = 0 if lean else KEPT_TOKENS
        self.recompute = recompute
        large = LARGE_CHUNK if isinstance(decoder.head, IntegerMatrix) and not lean else CHUNK
        self.head_tokens = LEAST_CHUNK if recompute else large
        self.elementwise = elementwise
        self.workspace = Workspace(decoder.dtype, self.device)
        self.lowest = next((number for number, layer in enumerate(decoder.layers) if layer.trained), 0)

    @torch.no_grad()
    def loss(self, rows: PackedRows) -> float:
        """Sum of the loss in nats over the trained tokens."""
        rows = rows.to(self.device)
        last = self.forward(self.prefix(rows), self.state(rows, None), rows.chosen, None)
        hidden = self.normalised(last[rows.labelled_among_chosen])[0].mul_(self.decoder.logit_scale)
        return cross_entropy(hidden, rows.targets, self.decoder.head, self.workspace, self.head_tokens).item()

    @torch.no_grad()
    def gradients(self, rows: PackedRows, scale: float, dropout: Dropout | None, prefix: Tensor | None = None) -> float:
        """Add the gradient of `scale` times the summed loss to the adapters' `.grad`; returns the sum in nats.

        `prefix` (T, H) is the residual stream below the lowest adapted layer, where it is known.
        """
        saved: list[Callable[[], LayerSaved]] = []
        rows = rows.to(self.device)
        state = self.state(rows, dropout)
        last = self.forward(self.prefix(rows) if prefix is None else prefix, state, rows.chosen, saved)
        labelled = last[rows.labelled_among_chosen]
        hidden, inverse = self.normalised(labelled)
        logit_scale = self.decoder.logit_scale
        nats, gradient = cross_entropy_with_gradient(
            hidden.mul_(logit_scale),
            rows.targets,
            self.decoder.head,
            scale * logit_scale,
            self.workspace,
            self.head_tokens,
        )
        dlabelled = rms_norm_backward(labelled, self.decoder.final_norm, inverse, gradient).to(last.dtype)
        dx = self.workspace.take("gradient", *last.shape).zero_()
        dx.index_add_(0, rows.labelled_among_chosen, dlabelled)  # a shared token is labelled once for each of its rows
        for number in reversed(range(self.lowest, len(self.decoder.layers))):
            layer = self.decoder.layers[number]
            dx = layer_backward(layer, saved.pop()(), state, dx, through=number > self.lowest)
        return nats.item()  # the only time that a GPU is waited for

    @torch.no_grad()
    def hidden(self, rows: PackedRows) -> Tensor:
        """Every token behind the final norm (T, H)."""
        rows = rows.to(self.device)
        return self.normalised(self.forward(self.prefix(rows), self.state(rows, None), None, None))[0]

    @torch.no_grad()
    def prefix(self, rows: PackedRows) -> Tensor:
        """The residual stream (T, H) below the lowest adapted layer: it never changes while the adapter is trained."""
        rows = rows.to(self.device)
        x, state = self.embed(rows), self.state(rows, None)
        for layer in self.decoder.layers[: self.lowest]:
            x, _ = layer_forward(layer, x, state, SPARE, None)
        return x

    def normalised(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Behind the final norm (n, H), and the inverse norms (n, 1)."""
        hidden, inverse = torch.empty_like(x), x.new_empty(len(x), 1, dtype=wide(x.dtype))
        rms_norm(x, self.decoder.final_norm, self.decoder.eps, hidden, inverse)
        return hidden, inverse

    def embed(self, rows: PackedRows) -> Tensor:
        x = self.decoder.embedding[rows.ids].to(self.decoder.dtype)
        if self.decoder.embedding_scale != 1:
            x *= torch.tensor(self.decoder.embedding_scale, dtype=x.dtype)  # rounded first, as the family does
        return x

    def forward(
        self, x: Tensor, state: Pass, chosen: Tensor | None, saved: list[Callable[[], LayerSaved]] | None
    ) -> Tensor:
        """From the residual stream below the lowest adapted layer to that behind the last (T, H), or (n, H) of the chosen tokens.

        `saved` takes, for each layer, how to get what the backward pass reads.
        """
        for group in self.decoder.groups:
            group.refresh(self.decoder.dtype)
        for number in range(self.lowest, len(self.decoder.layers)):
            layer = self.decoder.layers[number]
            needed = chosen if number + 1 == len(self.decoder.layers) else None
            if saved is None:
                x, _ = layer_forward(layer, x, state, SPARE, needed)
            elif self.recompute:
                stream = self.workspace.take(f"stream.{number}", *x.shape).copy_(x)
                recorded = RecordedDropout(state.dropout) if state.dropout else None
                x, kept = layer_forward(layer, x, replace(state, dropout=recorded), SPARE, needed)
                last = self.kept_last(kept, number)
                saved.append(partial(again, layer, stream, state, needed, recorded, last))
            else:
                x, kept = layer_forward(layer, x, state, str(number), needed)
                saved.append(partial(returned, kept))
        return x

    def kept_last(self, kept: LayerSaved, number: int) -> tuple[Saved, Tensor | None]:
        """What the last group of a layer keeps and gives, apart from that of other layers: its product is not computed again."""
        assert kept.down is not None
        down, branch = replace(kept.down), kept.branches[1]
        if down.reduced is not None:
            down.reduced = self.workspace.take(f"reduced.down.{number}", *down.reduced.shape).copy_(down.reduced)
        if branch is not None:
            branch = self.workspace.take(f"branch.{number}", *branch.shape).copy_(branch)
        return down, branch

    def state(self, rows: PackedRows, dropout: Dropout | None) -> Pass:
        decoder = self.decoder
        return Pass(
            segments=rows.segments,
            chosen_lengths=rows.chosen_lengths,
            turns=self.turns(rows.segments),
            dropout=dropout,
            workspace=self.workspace,
            eps=decoder.eps,
            activation=decoder.activation,
            elementwise=self.elementwise,
            attention=self.attention,
            kept_tokens=self.kept_tokens,
        )

    def turns(self, segments: list[Segment]) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Cosines and sines (T, 1, half) for each kind of layer, of each row as if it were alone: some scale by a row's length.

        None: of no width, for layers that leave heads as they are.
        """
        like = torch.empty(0, dtype=wide(self.decoder.dtype), device=self.device)
        places = [torch.arange(s.offset, s.offset + s.length, device=self.device)[None] for s in segments]
        nothing = like.new_empty(sum(segment.length for segment in segments), 1, 0)
        found: dict[str | None, tuple[Tensor, Tensor]] = {None: (nothing, nothing)}
        for kind, rotary in self.decoder.rotary.items():
            parts = [rotary(like, place) for place in places]
            half = parts[0][0].shape[-1] // 2
            cosine, sine = (torch.cat([part[which][0, :, :half] for part in parts])[:, None] for which in (0, 1))
            found[kind] = cosine, sine
        return found


def again(
    layer: Layer,
    x: Tensor,
    state: Pass,
    chosen: Tensor | None,
    recorded: RecordedDropout | None,
    last: tuple[Saved, Tensor | None],
) -> LayerSaved:
    state = replace(state, dropout=recorded.replay() if recorded else None)
    saved, _ = forward_to_gates(layer, x, state, SPARE, chosen)
    down, branch = last
    return replace(saved, down=down, branches=(saved.branches[0], branch))


def returned(kept: LayerSaved) -> LayerSaved:
    return kept
