"""Linear layers that share an input, their low-rank updates, and the gradients of both, without autograd.

y = x W^T + b + Σ scale · dropout(x) A^T B^T, each update in its own columns (https://arxiv.org/abs/2106.09685).
The input is stored once for all of them, and an update costs two small products in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from lorasmith.engine.lora.dropout import Dropout
from lorasmith.engine.lora.frozen import FrozenMatrix
from lorasmith.engine.models.workspace import Workspace


@dataclass
class LowRank:
    """One trained update: A (r, in) and B (out, r) are the master weights, whose `.grad` the backward pass adds to."""

    module: str
    columns: slice
    A: nn.Parameter
    B: nn.Parameter
    scale: float
    dropout: float


@dataclass
class Saved:
    """What one forward pass of a group keeps: its input (T, in), scale · dropout(x) A^T side by side (T, Σr), the masks."""

    x: Tensor
    reduced: Tensor | None
    dropped: list[Tensor | None]


@dataclass
class LoRAGroup:
    """`modules` are the linear layers in the order of their columns; a group without updates is only W."""

    name: str
    weight: FrozenMatrix
    bias: Tensor | None
    modules: list[str]
    updates: list[LowRank]
    down: Tensor | None = None  # every A, one below the other (Σr, in), in the dtype of the step
    up: list[Tensor] = field(default_factory=list)  # B^T (r, out): its gradient is then a product of two long matrices

    def refresh(self, dtype: torch.dtype) -> None:
        """Take the master weights as they are now."""
        if self.updates:
            self.down = torch.cat([update.A.detach().to(dtype) for update in self.updates])
            self.up = [update.B.detach().t().to(dtype).contiguous() for update in self.updates]

    def forward(self, x: Tensor, dropout: Dropout | None, workspace: Workspace, tag: str) -> tuple[Tensor, Saved]:
        """y (T, out) and what `backward` needs; `tag` keeps the tensors of layers apart."""
        y = self.weight.forward(x, self.bias, workspace, f"y.{self.name}.{tag}")
        if self.down is None:
            return y, Saved(x, None, [])
        dropped = [
            dropout.dropped(x.shape[1], update.dropout) if dropout and update.dropout else None
            for update in self.updates
        ]
        reduced = workspace.take(f"reduced.{self.name}.{tag}", len(x), len(self.down))
        if any(mask is not None for mask in dropped):
            for rank, mask in zip(self.ranks(), dropped, strict=True):
                reduced[:, rank] = torch.mm(without(x, mask, workspace), self.down[rank].t())
        else:
            torch.mm(x, self.down.t(), out=reduced)
        self.scale(reduced, dropped)
        for rank, update, up in zip(self.ranks(), self.updates, self.up, strict=True):
            y[:, update.columns].addmm_(reduced[:, rank], up)
        return y, Saved(x, reduced, dropped)

    def backward(self, gradient: Tensor, saved: Saved, workspace: Workspace, *, through: bool = True) -> Tensor | None:
        """Add to the updates' `.grad`; returns the gradient of x (T, in), or None where nothing below needs it."""
        dx, reduced = self.backward_input(gradient, saved, workspace, through=through)
        self.backward_down(reduced, saved, workspace)
        return dx

    def backward_input(
        self, gradient: Tensor, saved: Saved, workspace: Workspace, *, through: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """The part that needs no x: adds to the `.grad` of every B, returns the gradients of x and of x A^T (T, Σr)."""
        dx = self.weight.backward(gradient, workspace, f"dx.{self.name}") if through else None
        if self.down is None or saved.reduced is None:
            return dx, None
        reduced = torch.empty_like(saved.reduced)
        for rank, update, up in zip(self.ranks(), self.updates, self.up, strict=True):
            dy = gradient[:, update.columns]
            add_gradient(update.B, torch.mm(saved.reduced[:, rank].t(), dy).t())
            reduced[:, rank] = torch.mm(dy, up.t())
        self.scale(reduced, saved.dropped)
        if dx is None:
            return None, reduced
        if not any(mask is not None for mask in saved.dropped):
            return dx.addmm_(reduced, self.down), reduced
        for rank, mask in zip(self.ranks(), saved.dropped, strict=True):
            dx.add_(zero_at(torch.mm(reduced[:, rank], self.down[rank]), mask))
        return dx, reduced

    def backward_down(self, reduced: Tensor | None, saved: Saved, workspace: Workspace) -> None:
        """Add to the `.grad` of every A."""
        if reduced is None:
            return
        if any(mask is not None for mask in saved.dropped):
            for rank, update, mask in zip(self.ranks(), self.updates, saved.dropped, strict=True):
                add_gradient(update.A, torch.mm(reduced[:, rank].t(), without(saved.x, mask, workspace)))
            return
        gradients = torch.mm(reduced.t(), saved.x)
        for rank, update in zip(self.ranks(), self.updates, strict=True):
            add_gradient(update.A, gradients[rank])

    def ranks(self) -> list[slice]:
        """Where each update's columns of the reduced input are."""
        ends = list(accumulate((len(update.A) for update in self.updates), initial=0))
        return [slice(start, end) for start, end in pairwise(ends)]

    def scale(self, reduced: Tensor, dropped: list[Tensor | None]) -> None:
        """Multiply by alpha / r, and by 1 / (1 - p) where dropout took a share p, so that the mean stays."""
        factors = [
            update.scale / (1 - update.dropout) if mask is not None else update.scale
            for update, mask in zip(self.updates, dropped, strict=True)
        ]
        if len(set(factors)) == 1:
            reduced.mul_(factors[0])
            return
        for rank, factor in zip(self.ranks(), factors, strict=True):
            reduced[:, rank].mul_(factor)


def without(x: Tensor, dropped: Tensor | None, workspace: Workspace) -> Tensor:
    """x, or a copy with the dropped elements at zero."""
    return x if dropped is None else zero_at(workspace.take("kept", *x.shape).copy_(x), dropped)


def zero_at(x: Tensor, dropped: Tensor | None) -> Tensor:
    if dropped is not None:
        x.view(-1).index_fill_(0, dropped, 0)
    return x


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient)
