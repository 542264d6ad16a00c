"""Frozen weights in fewer bits than they are computed in: bitsandbytes' NF4 and FP4, int8 by rows, and as on disk.

4 bits: in blocks of 64 values a code each, times the block's largest magnitude. Double quantisation stores those magnitudes,
less their mean, in 8 bits by blocks of 256 (QLoRA, https://arxiv.org/abs/2305.14314). int8: round(127 w / largest of the row),
as LLM.int8 stores weights (https://arxiv.org/abs/2208.07339). As on disk: bf16 or fp16, whose values fp32 has too, so that
nothing is lost where fp32 is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lorasmith.engine.models.device import CPU
from lorasmith.engine.optional_imports import bitsandbytes_dequantize
from lorasmith.schemas.training import QuantizationName

FourBit = Literal["nf4", "fp4"]
Kind = Literal["nf4", "fp4", "int8", "stored"]
BLOCK, MAGNITUDE_BLOCK = 64, 256
CHUNK = 1 << 18  # bytes of codes at once: their indices and values stay in the cache of a core
GPU_CHUNK = 1 << 23  # what is needed beside them stays below 100 MB
AT_ONCE = 1 << 18  # elements that are quantised at once, a multiple of BLOCK: bounds what it takes on top
TINY = 1e-38  # instead of the largest magnitude of a block of zeros

# Quantiles of the normal distribution, as bitsandbytes has them; the index is the code.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of mantissa, divided by the largest.
FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))


@dataclass(frozen=True)
class Quantization:
    """How a base is held while an adapter trains on it. `double` is for 4 bits."""

    kind: Kind
    double: bool = True

    @classmethod
    def named(cls, name: QuantizationName, double: bool) -> Quantization | None:
        """What a spec asks for."""
        return None if name == "none" else cls(name, double)

    def __str__(self) -> str:
        return f"{self.kind} with double quantisation" if self.double and self.kind in ("nf4", "fp4") else self.kind


AS_STORED = Quantization("stored", double=False)


class QuantizedWeight(Protocol):
    """W (out, in)."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def kind(self) -> Kind: ...

    @property
    def nbytes(self) -> int: ...

    def dequantize(self, out: Tensor) -> Tensor:
        """Write W into `out` (out, in), contiguous and on the weight's device; computed in fp32, rounded once."""
        ...


def quantize(weight: Tensor, quantization: Quantization) -> QuantizedWeight:
    """weight (out, in) in any floating dtype."""
    if quantization.kind == "stored":
        return AsStored(weight.clone())
    if quantization.kind == "int8":
        return quantize_rows(weight)
    return quantize_blocks(weight, quantization.kind, double=quantization.double)


@dataclass
class Magnitudes:
    """The largest magnitude of each block (blocks,), in fp32, or in 8 bits with a scale for 256 of them and their mean."""

    values: Tensor
    scales: Tensor | None = None
    mean: Tensor | None = None

    def read(self) -> Tensor:
        """(blocks,) in fp32."""
        if self.scales is None or self.mean is None:
            return self.values
        coarse = dynamic_table(self.values.device)[self.values.int()]
        scales = self.scales.repeat_interleave(MAGNITUDE_BLOCK)[: len(coarse)]
        return coarse.mul_(scales).add_(self.mean)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + sum(part.nbytes for part in (self.scales, self.mean) if part is not None)


@dataclass
class Blocks:
    """NF4 or FP4: two codes a byte, the first in the upper half, over the weight row by row, filled up to whole blocks."""

    shape: tuple[int, int]
    kind: FourBit
    codes: Tensor
    magnitudes: Magnitudes

    def dequantize(self, out: Tensor) -> Tensor:
        elements, device = prod(self.shape), self.codes.device
        whole = elements % BLOCK == 0
        # bitsandbytes' kernel for a CPU changes weights behind our back, and is not asked.
        if whole and device.type != "cpu" and (kernel := bitsandbytes_dequantize()):
            kernel(self.codes[:, None], absmax=self.magnitudes.read(), out=out, blocksize=BLOCK, quant_type=self.kind)
            return out
        flat = out.view(-1) if whole else out.new_empty(2 * len(self.codes))
        magnitudes, pairs = self.magnitudes.read(), pair_table(self.kind, device)
        chunk = CHUNK if device.type == "cpu" else GPU_CHUNK
        indices = torch.empty(min(chunk, len(self.codes)), dtype=torch.int32, device=device)
        in_place = flat.dtype == torch.float32
        room = None if in_place else torch.empty(2 * len(indices), device=device)
        for start in range(0, len(self.codes), chunk):
            codes = self.codes[start : start + chunk]
            index = indices[: len(codes)].copy_(codes)
            target = flat[2 * start : 2 * (start + len(codes))]
            values = target if room is None else room[: len(target)]
            torch.index_select(pairs, 0, index, out=values.view(torch.int64))
            scales = magnitudes[2 * start // BLOCK : 2 * (start + len(codes)) // BLOCK, None]
            torch.mul(values.view(-1, BLOCK), scales, out=target.view(-1, BLOCK))
        if not whole:
            out.view(-1).copy_(flat[:elements])
        return out

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.magnitudes.nbytes


@dataclass
class Rows:
    """int8: codes (out, in), and scales (out, 1) in fp32."""

    codes: Tensor
    scales: Tensor
    kind: Literal["int8"] = "int8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self, out: Tensor) -> Tensor:
        if out.dtype != torch.float32:
            return torch.mul(self.codes, self.scales, out=out)
        return out.copy_(self.codes).mul_(self.scales)  # faster than a product of two dtypes

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


@dataclass
class AsStored:
    """The values (out, in) of the file in its own dtype; `shared` with an embedding, whose they are."""

    values: Tensor
    shared: bool = False
    kind: Literal["stored"] = "stored"

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def dequantize(self, out: Tensor) -> Tensor:
        return out.copy_(self.values)

    @property
    def nbytes(self) -> int:
        return 0 if self.shared else self.values.nbytes


def quantize_rows(weight: Tensor) -> Rows:
    device = weight.device
    codes = torch.empty(weight.shape, dtype=torch.int8, device=device)  # before what is freed again: no holes then
    scales = torch.empty(len(weight), 1, device=device)
    rows = max(1, AT_ONCE // weight.shape[1])
    for part, code, scale in zip(weight.split(rows), codes.split(rows), scales.split(rows), strict=True):
        part = part.float()
        largest = part.abs().amax(1, keepdim=True)
        code.copy_(torch.round(part * (127.0 / largest.clamp(min=TINY))))
        torch.div(largest, 127.0, out=scale)
    return Rows(codes, scales)


def quantize_blocks(weight: Tensor, kind: FourBit, *, double: bool) -> Blocks:
    flat = weight.reshape(-1)
    blocks = -(-len(flat) // BLOCK)
    codes = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=weight.device)
    largest = torch.empty(blocks, device=weight.device)
    parts = zip(flat.split(AT_ONCE), codes.split(AT_ONCE // 2), largest.split(AT_ONCE // BLOCK), strict=True)
    for part, pairs, magnitude in parts:
        code = to_codes(part.float(), table(kind, weight.device), BLOCK, magnitude)
        torch.bitwise_or(code[::2] << 4, code[1::2], out=pairs)
    magnitudes = quantize_magnitudes(largest) if double else Magnitudes(largest)
    return Blocks((weight.shape[0], weight.shape[1]), kind, codes, magnitudes)


def quantize_magnitudes(values: Tensor) -> Magnitudes:
    mean, scales = values.mean(), torch.empty(-(-len(values) // MAGNITUDE_BLOCK), device=values.device)
    codes = to_codes(values - mean, dynamic_table(values.device), MAGNITUDE_BLOCK, scales)
    return Magnitudes(codes[: len(values)].clone(), scales, mean)


def to_codes(values: Tensor, entries: Tensor, block: int, largest: Tensor) -> Tensor:
    """The index of the nearest entry for each value (n,) over the largest magnitude of its block, which goes into `largest`.

    The codes are filled up to whole blocks with that of zero.
    """
    blocks = F.pad(values, (0, -len(values) % block)).view(-1, block)
    torch.amax(blocks.abs(), 1, out=largest)
    ascending, order = torch.sort(entries, stable=True)
    scaled = blocks * (1 / largest.clamp(min=TINY))[:, None]
    nearest = torch.bucketize(scaled.view(-1), (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
    if torch.equal(ascending, entries):
        return nearest.to(torch.uint8)
    return order.to(torch.uint8)[nearest]


@cache
def table(kind: FourBit, device: torch.device = CPU) -> Tensor:
    """The value of each of the 16 codes."""
    return torch.tensor(NF4 if kind == "nf4" else FP4, device=device)


@cache
def pair_table(kind: FourBit, device: torch.device = CPU) -> Tensor:
    """The two fp32 values of each byte, as one 64-bit element (256,): one look-up for both."""
    byte = torch.arange(256, device=device)
    values = table(kind, device)
    return torch.stack([values[byte >> 4], values[byte & 15]], 1).contiguous().view(torch.int64).view(-1)


@cache
def dynamic_table(device: torch.device = CPU) -> Tensor:
    """bitsandbytes' signed 8-bit map (256,), ascending: decades from 1e-6 to 1, each with twice the steps of the one below.

    https://arxiv.org/abs/2110.02861, section 2.1.
    """
    positive: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive += (10 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2.0).tolist()
    return torch.tensor(sorted([*positive, *(-value for value in positive), 0.0, 1.0]), device=device)
