"""Products in 16-bit integers beside `torch.mm`, and what they round beside bf16.

python benchmarks/integer_products.py [--rows N] [--repeats N]: JSON lines, one closing line per claim, exit 1 when short. Speed: each
shape of the Qwen2.5-0.5B model forward and backward, in turn with `torch.mm` in fp32 on the same threads, for activations that are
normally distributed, heavy-tailed, and with two channels far above the others. Rounding: a product beside one in fp64, and
hidden states and adapter gradients of the built-in model beside fp64, with bf16 as the peer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import workload
from peft import LoraConfig, get_peft_model
from report import Bar, close, emit
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.lora.frozen import FrozenMatrix, IntegerMatrix, PlainMatrix
from lorasmith.engine.lora.integer_products import why_no_integers
from lorasmith.engine.models.decoder import PackedDecoder
from lorasmith.engine.models.families import multiply_in_integers, read_decoder
from lorasmith.engine.models.packing import pack
from lorasmith.engine.models.workspace import Workspace
from lorasmith.starter.location import starter_model

NAME = "integer_products"
SPEED_BAR = {"normal": 1.3, "heavy": 1.0, "channels": 1.0}  # the first is what `auto` asks for
ROUNDING_BAR = 0.5
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "int16": torch.float32, "bf16": torch.bfloat16}


def activations(kind: str, rows: int, columns: int) -> Tensor:
    """heavy: about every tenth row of a block has an outlier."""
    x = torch.randn(rows, columns)
    if kind == "heavy":
        return x * torch.exp(1.2 * torch.randn(rows, columns))
    if kind == "channels":
        x[:, 5] *= 100
        x[:, columns // 3] *= 300
    return x


def speed(kind: str, rows: int, repeats: int) -> Bar:
    workspace, seconds = Workspace(torch.float32), {"int16": 0.0, "fp32": 0.0}
    for product in workload.layer_products(workload.SHAPES["qwen2-0.5b"]):
        weight = torch.randn(product.out_features, product.in_features).bfloat16()
        matrices: dict[str, FrozenMatrix] = {"int16": IntegerMatrix(weight), "fp32": PlainMatrix(weight.float())}
        x, dy = activations(kind, rows, product.in_features), torch.randn(rows, product.out_features)
        for direction in ("forward", "backward"):
            found: dict[str, list[float]] = {name: [] for name in matrices}
            for _ in range(repeats + 1):
                for name, matrix in matrices.items():
                    found[name].append(timed(partial(step, matrix, direction, x, dy, workspace)))
            medians = {name: statistics.median(times[1:]) for name, times in found.items()}
            flops = 2e-9 * rows * product.out_features * product.in_features
            rates = {name: flops / taken for name, taken in medians.items()}
            emit(NAME, x=kind, product=product.name, direction=direction, rows=rows, **rates)
            for name, taken in medians.items():
                seconds[name] += taken
    ours, peer = (f"{1e3 * seconds[name]:.1f} ms" for name in ("int16", "fp32"))
    return Bar(f"{NAME} {kind}", ours, f"{peer} (torch.mm, fp32)", seconds["fp32"] / seconds["int16"], SPEED_BAR[kind])


def step(matrix: FrozenMatrix, direction: str, x: Tensor, dy: Tensor, workspace: Workspace) -> None:
    if direction == "forward":
        matrix.forward(x, None, workspace, "y")
    else:
        matrix.backward(dy, workspace, "dx")


def timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def product_error() -> Bar:
    x, weight = torch.randn(512, 896), torch.randn(896, 896)
    exact = x.double() @ weight.double().t()
    ours = distance(IntegerMatrix(weight).forward(x, None, Workspace(torch.float32), "y"), exact)
    return rounding("a product", ours, distance(x.bfloat16() @ weight.bfloat16().t(), exact))


def model_errors() -> list[Bar]:
    ids = [(7 * index + 3) % 2000 for index in range(300)]
    found = {name: computed(name, ids) for name in DTYPES}
    bars = []
    for place, what in enumerate(("hidden states, built-in model", "adapter gradients, built-in model")):
        errors = {name: distance(found[name][place], found["fp64"][place]) for name in ("fp32", "int16", "bf16")}
        emit(NAME, rounding=what, **errors)
        bars.append(rounding(what, errors["int16"], errors["bf16"]))
    return bars


def computed(name: str, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Hidden states, and the gradients of an adapter one behind the other."""
    base: Any = AutoModelForCausalLM.from_pretrained(starter_model(), dtype=DTYPES[name])
    torch.manual_seed(0)
    model = get_peft_model(base.requires_grad_(False), LoraConfig(r=8, target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.double() if name == "fp64" else parameter.data.float()
    decoder = read_decoder(model)  # type: ignore[arg-type]
    if name == "int16":
        multiply_in_integers(decoder)
    rows, packed = pack([RenderedExample(0, ids, [True] * len(ids))]), PackedDecoder(decoder)
    hidden = packed.hidden(rows).clone()
    packed.gradients(rows, 1.0, None)
    return hidden, torch.cat([parameter.grad.flatten() for parameter in trained if parameter.grad is not None])


def distance(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def rounding(what: str, ours: float, peer: float) -> Bar:
    return Bar(
        f"{NAME} error of {what}", f"{ours:.2g}", f"{peer:.2g} (bf16)", ours / peer, ROUNDING_BAR, at_least=False
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=900)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    if reason := why_no_integers():
        print(f"error: not on this machine: {reason}", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    return close(
        [*(speed(kind, options.rows, options.repeats) for kind in SPEED_BAR), product_error(), *model_errors()]
    )


if __name__ == "__main__":
    sys.exit(main())
