"""bf16, int16 or fp32, and weights as they are or packed, chosen by measuring this machine's CPU; a GPU says what it can."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import torch

from lorasmith.engine.lora.frozen import IntegerMatrix, can_pack, pack_weight, packed_product
from lorasmith.engine.lora.integer_products import why_no_integers
from lorasmith.engine.models.device import Device, free_bytes
from lorasmith.engine.models.workspace import Workspace
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.training import PrecisionSetting

Probe = Callable[[], float]
Precision = Literal["bf16", "int16", "fp32"]
# Of all but products with frozen weights
DTYPES = {"bf16": torch.bfloat16, "int16": torch.float32, "fp32": torch.float32}
Memory = Literal["fast", "lean"]
Weights = Literal["stored", "converted"]
WORTHWHILE = 1.3  # bf16 or int16 must be this much faster to pay for its casts
WORTH_A_COPY = 1.05  # packed products must be this much faster to pay for a second copy of the weights
SPARE_SHARE = 0.5  # of the memory that is free, which packing may take


def choose_precision(wanted: PrecisionSetting, device: Device = "cpu") -> Precision:
    """bf16 where it is multiplied natively, else int16 where that is faster than fp32, which rounds less than bf16.

    Raises `InvalidSpec` where int16 is asked for and this machine cannot compute it.
    """
    if wanted != "auto":
        check_precision(wanted, device)
        return wanted
    native = native_precision(device)
    if native == "fp32" and device == "cpu" and why_no_integers() is None:
        return "int16" if times_faster(matrix_probe("int16"), matrix_probe("fp32")) > WORTHWHILE else "fp32"
    return native


def check_precision(precision: Precision, device: Device = "cpu") -> None:
    """Raise `InvalidSpec` unless it can be computed here."""
    if precision != "int16":
        return
    reason = "they are for a CPU" if device == "cuda" else why_no_integers()
    if reason is not None:
        raise InvalidSpec(f"products in int16 cannot be computed here: {reason}", hint="--set training.precision=fp32")


def native_precision(device: Device = "cpu") -> Literal["bf16", "fp32"]:
    """bf16 where it is multiplied natively, else fp32. Never fp16, which a CPU multiplies ten times slower."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if times_faster(matrix_probe("bf16"), matrix_probe("fp32")) > WORTHWHILE else "fp32"


def choose_weights(
    wanted: Literal["auto", "fast", "lean"], precision: Precision, half_bytes: int, device: Device = "cpu"
) -> Weights:
    """stored where fp32 is computed and memory is short: weights stay in the 16 bits of their file, and lose nothing.

    `half_bytes` are those that the file has in 16 bits. Widening them in each product costs 3 to 6 % of a step
    (benchmarks/NOTES.md), so that with `auto` it is done only where the fp32 ones would fill half of the free memory. Products
    in int16 read them as they are.
    """
    if precision == "int16" and half_bytes:
        return "stored"
    if precision != "fp32" or not half_bytes or wanted == "fast":
        return "converted"
    if wanted == "lean" or 2 * half_bytes > SPARE_SHARE * free_bytes(device):
        return "stored"
    return "converted"


def choose_memory(
    wanted: Literal["auto", "fast", "lean"], precision: Precision, extra_bytes: int, device: Device = "cpu"
) -> Memory:
    """fast where packed products are possible, measurably faster, and their `extra_bytes` fit; they are on a CPU, not in int16."""
    if wanted == "lean" or device != "cpu" or precision == "int16" or not can_pack(DTYPES[precision]):
        return "lean"
    if wanted == "fast":
        return "fast"
    if extra_bytes > SPARE_SHARE * free_bytes(device):
        return "lean"
    return (
        "fast" if times_faster(matrix_probe(precision, packed=True), matrix_probe(precision)) > WORTH_A_COPY else "lean"
    )


def times_faster(one: Probe, other: Probe) -> float:
    """The fastest of nine each, by turns: what else the machine does meets both."""
    seconds = [(one(), other()) for _ in range(9)]
    return min(second for _, second in seconds) / min(first for first, _ in seconds)


def matrix_seconds(precision: Precision, *, packed: bool = False) -> float:
    """Seconds of the fastest of five products."""
    probe = matrix_probe(precision, packed=packed)
    return min(probe() for _ in range(5))


def matrix_probe(precision: Precision, *, packed: bool = False) -> Probe:
    """Seconds of a (512, 1024) x (1024, 2048) product, which each call makes once."""
    dtype = DTYPES[precision]
    left, right = torch.randn(512, 1024).to(dtype), torch.randn(2048, 1024).to(dtype)
    weight = pack_weight(right) if packed else right
    integers, workspace = IntegerMatrix(right.bfloat16()), Workspace(dtype)

    def seconds() -> float:
        began = time.perf_counter()
        if precision == "int16":
            integers.forward(left, None, workspace, "product")
        elif packed:
            packed_product(left, weight, None)
        else:
            torch.mm(left, weight.t())
        return time.perf_counter() - began

    return seconds
