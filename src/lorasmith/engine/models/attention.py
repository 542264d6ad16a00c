"""Causal attention over packed rows, each row for itself, by blocks of queries.

For rows of a few hundred tokens two matrix products and a softmax are up to five times faster on a CPU than the fused
kernel. Probabilities of short rows are kept for the gradient; those of long rows are computed again block by block, so
memory grows with the length and not with its square. Queries that share a key head are folded into the rows of one product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lorasmith.engine.models.packing import Segment
from lorasmith.engine.models.workspace import Workspace

BLOCK = 256  # queries at a time
KEPT_TOKENS = 512  # rows up to here keep their probabilities, where memory is not to be saved


@dataclass(frozen=True)
class Heads:
    """Query heads in groups that share a key head; `window` is how far back a token sees, itself included."""

    key_heads: int
    group: int
    head_dim: int
    window: int | None

    @property
    def query_width(self) -> int:
        return self.key_heads * self.group * self.head_dim

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_dim


@dataclass(frozen=True)
class Block:
    """Queries `first` to `last` of a segment's row, and the row's keys from `seen` to `last` that they look at."""

    first: int
    last: int
    seen: int

    def size(self, heads: Heads) -> int:
        return heads.key_heads * (self.last - self.first) * heads.group * (self.last - self.seen)


def blocks(segment: Segment, window: int | None, queries: int = BLOCK) -> list[Block]:
    """Every block of a segment, in order; positions are those of its row."""
    end = segment.offset + segment.length
    return [
        Block(first, last, max(0, first - window + 1) if window else 0)
        for first, last in pairwise([*range(segment.offset, end, queries), end])
    ]


def keeps(segment: Segment, kept_tokens: int) -> bool:
    return segment.offset + segment.length <= kept_tokens


def kept_size(segments: list[Segment], heads: Heads, kept_tokens: int) -> int:
    """Probabilities that `attend` keeps for the gradient: those of rows of up to `kept_tokens`."""
    return sum(block.size(heads) for s in segments if keeps(s, kept_tokens) for block in blocks(s, heads.window))


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
    """out = softmax(q k^T + causal) v for each segment, over its own keys and those before it.

    q (key_heads, T, group, head_dim), already scaled; k, v (key_heads, T, head_dim); out like q. `kept` is flat and takes
    the probabilities of short rows, `kept_size` of them.
    """
    offset = 0
    for segment in segments:
        keys, values = gathered(k, segment, workspace, "keys"), gathered(v, segment, workspace, "values")
        for block in blocks(segment, heads.window):
            size, queries = block.size(heads), queries_of(segment, block)
            if keeps(segment, kept_tokens):
                flat = kept[offset : offset + size]
                offset += size
            else:
                flat = workspace.take("probabilities", size)
            p = probabilities(q[:, queries], keys, block, heads, flat)
            mixed = torch.bmm(p, values[:, block.seen : block.last])
            out[:, queries] = mixed.view(heads.key_heads, -1, heads.group, heads.head_dim)


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
    offset = 0
    for segment, keys, values, dkeys, dvalues in seen_by_each(k, v, dk, dv, segments, workspace):
        for block in blocks(segment, heads.window):
            size, queries, seen = block.size(heads), queries_of(segment, block), slice(block.seen, block.last)
            if keeps(segment, kept_tokens):
                p = kept[offset : offset + size].view(heads.key_heads, -1, block.last - block.seen)
                offset += size
            else:
                p = probabilities(q[:, queries], keys, block, heads, workspace.take("probabilities", size))
            dout = gradient[:, queries].reshape(heads.key_heads, -1, heads.head_dim)
            dvalues[:, seen] += torch.bmm(p.transpose(1, 2), dout)
            dp = torch.bmm(dout, values[:, seen].transpose(1, 2), out=workspace.take("dp", *p.shape))
            torch.ops.aten._softmax_backward_data.out(dp, p, -1, dp.dtype, grad_input=dp)
            dq[:, queries] = torch.bmm(dp, keys[:, seen]).view(heads.key_heads, -1, heads.group, heads.head_dim)
            folded = q[:, queries].reshape(heads.key_heads, -1, heads.head_dim)
            dkeys[:, seen] += torch.bmm(dp.transpose(1, 2), folded)
    return dq, dk, dv


def probabilities(q: Tensor, keys: Tensor, block: Block, heads: Heads, out: Tensor) -> Tensor:
    """Attention weights of a block (key_heads, queries · group, keys), row sums 1, in the flat tensor `out`."""
    count, width = block.last - block.first, block.last - block.seen
    out = out.view(heads.key_heads, count * heads.group, width)
    torch.bmm(q.reshape(heads.key_heads, -1, heads.head_dim), keys[:, block.seen : block.last].transpose(1, 2), out=out)
    scores = out.view(heads.key_heads, count, heads.group, width)
    if heads.window is None or block.last <= heads.window:
        # Only the square on the diagonal holds keys behind a query.
        mask = torch.full((count, count), -torch.inf, dtype=out.dtype, device=out.device).triu_(1)
        scores[..., width - count :].add_(mask[:, None])
    else:
        scores.masked_fill_(~visible(block, heads.window, out.device)[:, None], -torch.inf)
    return torch.ops.aten._softmax.out(out, -1, False, out=out)  # type: ignore[no-any-return]


def visible(block: Block, window: int | None, device: torch.device) -> Tensor:
    """Which keys (queries, keys) each query of a block looks at: none behind it, and of a window the last ones."""
    query = torch.arange(block.first, block.last, device=device)[:, None]
    key = torch.arange(block.seen, block.last, device=device)
    return (key <= query) if window is None else (key <= query) & (key > query - window)


def queries_of(segment: Segment, block: Block) -> slice:
    """Where the block's queries are in the pack."""
    shift = segment.start - segment.offset
    return slice(block.first + shift, block.last + shift)


def gathered(x: Tensor, segment: Segment, workspace: Workspace, name: str) -> Tensor:
    """Keys or values (key_heads, offset + length, head_dim) of the row up to the segment's end."""
    if not segment.before:
        return x[:, segment.own]
    parts = [x[:, part] for part in (*segment.before, segment.own)]
    whole = workspace.take(name, x.shape[0], segment.offset + segment.length, x.shape[2])
    return torch.cat(parts, dim=1, out=whole)


def gradient_of(x: Tensor, segment: Segment, workspace: Workspace, name: str) -> Tensor:
    """Where the gradient of `gathered` is summed: in its place, or apart where it belongs to several segments."""
    if not segment.before:
        return x[:, segment.own]
    return workspace.take(name, x.shape[0], segment.offset + segment.length, x.shape[2]).zero_()


def seen_by_each(
    k: Tensor, v: Tensor, dk: Tensor, dv: Tensor, segments: list[Segment], workspace: Workspace
) -> Iterator[tuple[Segment, Tensor, Tensor, Tensor, Tensor]]:
    """Each segment with the keys and values that it sees, and where their gradients are summed; then dk and dv get these."""
    for segment in segments:
        keys, values = gathered(k, segment, workspace, "keys"), gathered(v, segment, workspace, "values")
        dkeys, dvalues = gradient_of(dk, segment, workspace, "dkeys"), gradient_of(dv, segment, workspace, "dvalues")
        yield segment, keys, values, dkeys, dvalues
        scatter(dkeys, dk, segment)
        scatter(dvalues, dv, segment)


def scatter(gradient: Tensor, x: Tensor, segment: Segment) -> None:
    """Add a gradient that was summed apart to the segments that it belongs to."""
    position = 0
    for part in (*segment.before, segment.own) if segment.before else ():
        x[:, part] += gradient[:, position : position + part.stop - part.start]
        position += part.stop - part.start


@dataclass(frozen=True)
class Attention:
    """How attention is computed, as a layer calls it: what it keeps for the gradient, forward and backward."""

    kept_size: Callable[[list[Segment], Heads, int], int] = kept_size
    attend: Callable[..., None] = attend
    attend_backward: Callable[..., tuple[Tensor, Tensor, Tensor]] = attend_backward


BY_BLOCKS = Attention()
