"""Norm, gate and rotation with their gradients, written into given tensors.

As they stand each is a few operations of torch, in blocks of rows that stay in the cache where a tensor is large. Compiled,
each is one loop that reads and writes its tensors once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch.nn import functional as F

from lorasmith.engine.models.device import Device, has_triton

ROWS = 64  # of an MLP activation at a time on a CPU: 64 x 4,864 x 2 bytes lie in a 1 MB cache


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, inverse: Tensor) -> None:
    """out = x · inverse · weight, inverse = 1 / sqrt(mean(x²) + eps); https://arxiv.org/abs/1910.07467.

    x, out (…, H); weight (H,); inverse (…, 1) in fp32 or wider.
    """
    values = x.to(inverse.dtype)
    inverse.copy_(torch.rsqrt(values.square().mean(-1, keepdim=True) + eps))
    out.copy_((values * inverse).to(out.dtype) * weight)


def rms_norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of x, in the dtype of `inverse`; `gradient` is that of out."""
    scaled = gradient.to(inverse.dtype) * weight
    normal = x.to(inverse.dtype) * inverse
    return (scaled - normal * (scaled * normal).mean(-1, keepdim=True)) * inverse


def add_rms_norm_backward(x: Tensor, weight: Tensor, inverse: Tensor, gradient: Tensor, out: Tensor) -> None:
    """out += gradient of x."""
    out += rms_norm_backward(x, weight, inverse, gradient)


def gate(kind: str, gates: Tensor, ups: Tensor, out: Tensor) -> None:
    """out = activation(gates) · ups, all (T, I); https://arxiv.org/abs/2002.05202."""
    for rows in parts(gates):
        torch.mul(activate(kind, gates[rows]), ups[rows], out=out[rows])


def gate_backward(kind: str, gradient: Tensor, gates: Tensor, ups: Tensor, out: Tensor) -> None:
    """Recompute `out` and put the gradients of gates and ups in their places."""
    for rows in parts(gates):
        active = activate(kind, gates[rows])
        torch.mul(active, ups[rows], out=out[rows])
        through = gradient[rows] * ups[rows]
        torch.mul(gradient[rows], active, out=ups[rows])
        gates[rows] = activate_backward(kind, through, gates[rows])


def parts(x: Tensor) -> list[slice]:
    """Rows that are computed together: what fits into the cache of a CPU, and all of them on a GPU."""
    return [slice(start, start + ROWS) for start in range(0, len(x), ROWS)] if x.is_cpu else [slice(None)]


def activate(kind: str, x: Tensor) -> Tensor:
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def activate_backward(kind: str, gradient: Tensor, x: Tensor) -> Tensor:
    if kind == "silu":
        return torch.ops.aten.silu_backward(gradient, x)  # type: ignore[no-any-return]
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(gradient, x, approximate=approximate)  # type: ignore[no-any-return]


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, out: Tensor, *, pass_scale: float = 1.0) -> None:
    """Rotary positions, https://arxiv.org/abs/2104.09864: halves (a, b) become (a·cos − b·sin, b·cos + a·sin).

    x, out (heads, T, group, head_dim); cosine, sine (T, 1, half). What lies beyond the two halves, where only a part is
    rotated, is multiplied by `pass_scale`. With −sine it is the inverse, which is also the gradient.
    """
    half = cosine.shape[-1]
    first, second = x[..., :half].to(cosine.dtype), x[..., half : 2 * half].to(cosine.dtype)
    out[..., :half] = (first * cosine).addcmul_(second, sine, value=-1)
    out[..., half : 2 * half] = (second * cosine).addcmul_(first, sine)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :] * pass_scale


def whole_gate(kind: str, gates: Tensor, ups: Tensor, out: Tensor) -> None:
    """`gate` without blocks, in fp32 between reading and writing: for the compiler."""
    out.copy_(activate(kind, gates.to(wide(gates.dtype))) * ups)


def whole_gate_backward(kind: str, gradient: Tensor, gates: Tensor, ups: Tensor, out: Tensor) -> None:
    x, y, g = (part.to(wide(part.dtype)) for part in (gates, ups, gradient))
    active = activate(kind, x)
    through = activate_backward(kind, g * y, x)
    out.copy_(active * y)
    ups.copy_(g * active)
    gates.copy_(through)


@dataclass(frozen=True)
class Elementwise:
    """The five of them, as a layer calls them."""

    rms_norm: Callable[..., None] = rms_norm
    add_rms_norm_backward: Callable[..., None] = add_rms_norm_backward
    gate: Callable[..., None] = gate
    gate_backward: Callable[..., None] = gate_backward
    rotate: Callable[..., None] = rotate


EAGER = Elementwise()


def can_compile(device: Device = "cpu") -> bool:
    if device == "cuda":
        return has_triton()
    return shutil.which("g++") is not None or shutil.which("clang++") is not None


@cache
def compiled() -> Elementwise:
    """The first call of each takes seconds, or half a minute where torch's compile cache is empty."""
    # One graph for each layout of memory that a layer calls them with; beyond the usual 8 it would give up.
    torch._dynamo.config.recompile_limit = 64
    # Else sizes that are equal in the first step, by chance, have to stay so, or all is compiled again in the second.
    torch.fx.experimental._config.use_duck_shape = False

    def loop(function: Callable[..., None]) -> Callable[..., None]:
        compiled_function: Callable[..., None] = torch.compile(function, dynamic=True, fullgraph=True)
        return compiled_function

    return Elementwise(
        rms_norm=loop(rms_norm),
        add_rms_norm_backward=loop(add_rms_norm_backward),
        gate=loop(whole_gate),
        gate_backward=loop(whole_gate_backward),
        rotate=loop(rotate),
    )
