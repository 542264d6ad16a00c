"""Frozen layers in fewer bits than they are computed in, for transformers, PEFT and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorasmith.engine.lora.quantized import Quantization, QuantizedWeight, quantize
from lorasmith.engine.models.device import device_of


class QuantizedLinear(nn.Linear):
    """x W^T + b; W is dequantised when it is used, in training and in evaluation alike, and never kept.

    `weight` has no elements, so that whatever would change it, such as a merge, fails instead of changing a copy.
    `read_full` gets the weight (out, in) as it is on disk: some first weights of an adapter are made from it. `stored` is
    what it comes to, where that is known already; it stays on its device, whatever `to` moves.
    """

    def __init__(
        self,
        read_full: Callable[[], Tensor],
        bias: Tensor | None,
        quantization: Quantization,
        dtype: torch.dtype,
        stored: QuantizedWeight | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make the weight
        self.read_full = read_full
        self.quantization = quantization
        self.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self.stored = quantize(read_full(), quantization) if stored is None else stored
        self.out_features, self.in_features = self.stored.shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]

    def quantize(self, weight: Tensor) -> None:
        """Take `weight` (out, in) instead."""
        self.stored = quantize(weight, self.quantization)

    def dequantized(self) -> Tensor:
        """W (out, in), a new tensor in the compute dtype."""
        out = torch.empty(self.stored.shape, dtype=self.weight.dtype, device=device_of(self.weight))
        return self.stored.dequantize(out)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = DequantizedProduct.apply(x, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.quantization}"


class WidenedEmbedding(nn.Embedding):
    """Rows of a table (V, H) in 16 bits, in the compute dtype, times what the family scales them by in the table's module."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        rows, columns = embedding.weight.shape
        super().__init__(rows, columns, _weight=embedding.weight, _freeze=True)
        self.dtype = dtype
        self.scale = getattr(embedding, "scalar_embed_scale", 1.0)

    def forward(self, ids: Tensor) -> Tensor:
        rows = super().forward(ids).to(self.dtype)
        return rows if self.scale == 1 else rows * torch.tensor(self.scale, dtype=self.dtype)


class DequantizedProduct(torch.autograd.Function):
    """x W^T, whose gradient dequantises W once more instead of keeping it."""

    @staticmethod
    def forward(context: Any, x: Tensor, linear: QuantizedLinear) -> Tensor:
        context.linear, context.dtype = linear, x.dtype
        return F.linear(x.to(linear.weight.dtype), linear.dequantized())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weight = context.linear.dequantized()
        return (gradient.to(weight.dtype) @ weight).to(context.dtype), None


def quantized_bytes(model: nn.Module) -> int:
    return sum(module.stored.nbytes for module in model.modules() if isinstance(module, QuantizedLinear))


def quantized_elements(model: nn.Module) -> int:
    """Weights that are no parameters of the model, as they are stored in fewer bits."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear) and module.stored.nbytes]
    return sum(module.in_features * module.out_features for module in layers)
