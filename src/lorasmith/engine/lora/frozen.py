"""Products with a frozen matrix in both directions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lorasmith.engine.lora.integer_products import coded, integer_product
from lorasmith.engine.lora.quantized import AsStored, QuantizedWeight
from lorasmith.engine.models.workspace import Workspace

WIDENED_ELEMENTS = 1 << 25  # 128 MB in fp32
PACKED_FOR_TOKENS = 1024  # the layout chosen for this many rows is as fast from 512 to 4,096


class FrozenMatrix(Protocol):
    """W (out, in), never trained."""

    path: str

    def forward(self, x: Tensor, bias: Tensor | None, workspace: Workspace, name: str) -> Tensor:
        """x W^T + bias, (T, out), in a tensor that the caller may change."""
        ...

    def backward(self, gradient: Tensor, workspace: Workspace, name: str) -> Tensor:
        """gradient W, (T, in), in a tensor that the caller may change."""
        ...


class PlainMatrix:
    """The weights as they are: one copy, shared with the model they came from."""

    path = "plain"

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def forward(self, x: Tensor, bias: Tensor | None, workspace: Workspace, name: str) -> Tensor:
        out = workspace.take(name, len(x), len(self.weight))
        if bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(bias, x, self.weight.t(), out=out)

    def backward(self, gradient: Tensor, workspace: Workspace, name: str) -> Tensor:
        return torch.mm(gradient, self.weight, out=workspace.take(name, len(gradient), self.weight.shape[1]))


class PackedMatrix:
    """Two copies in oneDNN's blocked layout, W for the forward and W^T for the gradient: faster, at twice the memory."""

    path = "packed"

    def __init__(self, weight: Tensor) -> None:
        self.towards = pack_weight(weight)
        self.back = pack_weight(weight.t())

    def forward(self, x: Tensor, bias: Tensor | None, workspace: Workspace, name: str) -> Tensor:
        return packed_product(x, self.towards, bias)

    def backward(self, gradient: Tensor, workspace: Workspace, name: str) -> Tensor:
        return packed_product(gradient, self.back, None)


class QuantizedMatrix:
    """Weights in 4 or 8 bits, one below the other, shared with the model they came from.

    W is dequantised into one buffer for all matrices, each time it is used: blocks of rows that stay in the cache made
    the products slower than they saved (benchmarks/NOTES.md).
    """

    def __init__(
        self, parts: Sequence[QuantizedWeight], dequantized: Callable[[Tensor], FrozenMatrix] = PlainMatrix
    ) -> None:
        self.parts = parts
        self.dequantized = dequantized  # how the buffer is multiplied
        self.path: str = parts[0].kind

    def forward(self, x: Tensor, bias: Tensor | None, workspace: Workspace, name: str) -> Tensor:
        return self.dequantized(self.dequantize(workspace)).forward(x, bias, workspace, name)

    def backward(self, gradient: Tensor, workspace: Workspace, name: str) -> Tensor:
        return self.dequantized(self.dequantize(workspace)).backward(gradient, workspace, name)

    def dequantize(self, workspace: Workspace) -> Tensor:
        rows = [part.shape[0] for part in self.parts]
        weight = workspace.take("dequantized", sum(rows), self.parts[0].shape[1])
        for part, place in zip(self.parts, weight.split(rows), strict=True):
            part.dequantize(place)
        return weight


class WidenedMatrix:
    """Values (out, in) in 16 bits, widened a block of rows at a time: for output heads, of which a whole one is large.

    The sums of `backward` go over the blocks, so they are rounded in another order than those of one product.
    """

    path = "stored"

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.blocks = values.split(max(1, WIDENED_ELEMENTS // values.shape[1]))

    def forward(self, x: Tensor, bias: Tensor | None, workspace: Workspace, name: str) -> Tensor:
        out = workspace.take(name, len(x), self.values.shape[0])
        for block, columns in zip(self.blocks, out.split([len(block) for block in self.blocks], dim=1), strict=True):
            torch.mm(x, self.widened(block, workspace).t(), out=columns)
        return out if bias is None else out.add_(bias)

    def backward(self, gradient: Tensor, workspace: Workspace, name: str) -> Tensor:
        out = workspace.take(name, len(gradient), self.values.shape[1]).zero_()
        for block, columns in zip(
            self.blocks, gradient.split([len(block) for block in self.blocks], dim=1), strict=True
        ):
            out.addmm_(columns, self.widened(block, workspace))
        return out

    def widened(self, block: Tensor, workspace: Workspace) -> Tensor:
        return workspace.take("dequantized", *block.shape).copy_(block)


class IntegerMatrix:
    """Weights (out, in) as they are stored, in fp32, bf16 or fp16, one below the other, multiplied in integers."""

    path = "int16"

    def __init__(self, *parts: Tensor) -> None:
        self.parts = parts
        self.rows = [len(part) for part in parts]

    def forward(self, x: Tensor, bias: Tensor | None, workspace: Workspace, name: str) -> Tensor:
        out = workspace.take(name, len(x), sum(self.rows))
        codes = coded(x, workspace, spare_outliers=True)
        for part, columns in zip(self.parts, out.split(self.rows, dim=1), strict=True):
            integer_product(codes, part, columns)
        return out if bias is None else out.add_(bias)

    def backward(self, gradient: Tensor, workspace: Workspace, name: str) -> Tensor:
        out = workspace.take(name, len(gradient), self.parts[0].shape[1])
        for number, (part, columns) in enumerate(zip(self.parts, gradient.split(self.rows, dim=1), strict=True)):
            integer_product(coded(columns, workspace), part, out, sums_over_rows=True, add=number > 0)
        return out


def in_integers(matrix: FrozenMatrix) -> FrozenMatrix:
    """The same weights, multiplied in integers."""
    if isinstance(matrix, PlainMatrix):
        return IntegerMatrix(matrix.weight)
    if isinstance(matrix, WidenedMatrix):
        return IntegerMatrix(matrix.values)
    if isinstance(matrix, QuantizedMatrix):
        as_stored = [part.values for part in matrix.parts if isinstance(part, AsStored)]
        if len(as_stored) == len(matrix.parts):
            return IntegerMatrix(*as_stored)
        return QuantizedMatrix(matrix.parts, IntegerMatrix)
    return matrix


def pack_weight(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_FOR_TOKENS)
    return packed


def packed_product(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has the private operators, and they compute what they should."""
    weight, x = torch.randn(32, 64).to(dtype), torch.randn(16, 64).to(dtype)
    try:
        product = packed_product(x, pack_weight(weight), None)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(product.float(), (x @ weight.t()).float(), rtol=0.02, atol=0.1)
