"""PiSSA, OLoRA and LoftQ start from a part of W in B A and train beside the rest of W; all end as a plain LoRA.

W = rest + s B0 A0, so the update after training is s (B A - B0 A0) = s [B, -B0] [A; A0]: twice the rank, the same s.
With a quantised base the rest is quantised: on the full W the adapter then differs from the model that was trained by
W - rest - s B0 A0, which LoftQ makes small, where a plain QLoRA differs by W - Q.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load, save, save_file
from torch import Tensor, nn

from lorasmith.engine.lora.quantized import Quantization, quantize
from lorasmith.engine.lora.quantized_linear import QuantizedLinear
from lorasmith.engine.models.loading import ADAPTER_WEIGHTS
from lorasmith.engine.reporting import Reporter
from lorasmith.files import sha256_bytes, write_bytes, write_text
from lorasmith.schemas.training import InitialWeights

FILE, CHECKSUM = "initial.safetensors", "initial.sha256"  # in the job folder
TAKEN_OUT = "taken_out."  # before the names of factors that left the base instead of A0 and B0
EXACT_UP_TO = 1024  # of the smaller side; above, PEFT's randomised decomposition: seconds instead of minutes a matrix
POWER_ITERATIONS = 16


def pissa(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) with scale · B A = the `rank` largest singular parts, https://arxiv.org/abs/2404.02948."""
    if min(weight.shape) <= EXACT_UP_TO:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
    else:
        left, values, right = torch.svd_lowrank(weight, rank, niter=POWER_ITERATIONS)
        right = right.t()
    roots = (values[:rank] / scale).sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots


def olora(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), the first of W = Q R, B orthonormal, https://arxiv.org/abs/2406.01775."""
    q, r = torch.linalg.qr(weight)
    return r[:rank], q[:, :rank]


FACTORS = {"pissa": pissa, "olora": olora}


def loftq(
    weight: Tensor, rank: int, scale: float, quantization: Quantization, iterations: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A (r, in) and B (out, r) with scale · B A = the main part of W - Q, and the A and B before the last round.

    Q = quantised(W - scale · B A) of the round before, which begins with A and B of rank 0: algorithm 1 of
    https://arxiv.org/abs/2310.08659.
    """
    A, B = weight.new_zeros(0, weight.shape[1]), weight.new_zeros(weight.shape[0], 0)
    before = A, B
    for _ in range(iterations):
        before = A, B
        quantized = quantize(weight - scale * (B @ A), quantization).dequantize(torch.empty_like(weight))
        A, B = pissa(weight - quantized, rank, scale)
    return A, B, *before


def moves_weight(init: InitialWeights) -> bool:
    """Whether the base is changed while training."""
    return init in FACTORS or init == "loftq"


def start(
    model: PeftModel, init: InitialWeights, job: Path, report: Reporter, *, loftq_iterations: int = 1
) -> dict[str, Tensor]:
    """Put A0 and B0 into a fresh adapter and take them out of the base; returns them by their names in a PEFT file.

    They are computed once and kept in the job folder, so that a resumed run starts from the same bits.
    """
    if not moves_weight(init):
        return {}
    stored = kept_factors(model, init, job, report, loftq_iterations)
    with torch.no_grad():
        for name, layer in lora_layers(model):
            names = [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
            layer.lora_A["default"].weight.copy_(stored[names[0]])
            layer.lora_B["default"].weight.copy_(stored[names[1]])
            base = layer.get_base_layer()
            device = base.weight.device
            A, B = (stored.get(TAKEN_OUT + name, stored[name]).to(device) for name in names)
            rest = full_weight(base) - layer.scaling["default"] * (B @ A)
            if isinstance(base, QuantizedLinear):
                base.quantize(rest)
            else:
                base.weight = nn.Parameter(rest.to(base.weight.dtype), requires_grad=False)  # a tied embedding stays
    return {name: tensor for name, tensor in stored.items() if not name.startswith(TAKEN_OUT)}


def kept_factors(
    model: PeftModel, init: InitialWeights, job: Path, report: Reporter, loftq_iterations: int
) -> dict[str, Tensor]:
    """What `factors` made when the run began; made again, with a warning, where its bytes have changed since."""
    file, checksum = job / FILE, job / CHECKSUM
    expected = checksum.read_text(encoding="utf-8").strip() if checksum.is_file() else None
    kept = file.read_bytes() if file.is_file() else None
    if kept is not None and sha256_bytes(kept) == expected:
        return load(kept)
    made = save(factors(model, init, loftq_iterations))
    if kept is not None and kept != made:
        damage = f"{file} is damaged: it does not match its checksum" if expected else f"{checksum} is missing"
        same = (
            "with the same bytes as at the beginning"
            if sha256_bytes(made) == expected
            else "and may be rounded otherwise than at the beginning"
        )
        report("warning", text=f"{damage}; the first A and B are computed again from the base, {same}")
    write_text(checksum, sha256_bytes(made))  # first, so that a crash leaves no file without one
    write_bytes(file, made)
    return load(made)


@torch.no_grad()
def factors(model: PeftModel, init: InitialWeights, loftq_iterations: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(model):
        base, rank, scale = layer.get_base_layer(), layer.r["default"], layer.scaling["default"]
        names = [f"{name}.lora_A.weight", f"{name}.lora_B.weight"]
        if init == "loftq":
            names += [TAKEN_OUT + name for name in names]
            tensors: tuple[Tensor, ...] = loftq(full_weight(base), rank, scale, base.quantization, loftq_iterations)
        else:
            tensors = FACTORS[init](full_weight(base), rank, scale)
        found.update(zip(names, (tensor.contiguous() for tensor in tensors), strict=True))
    return found


def full_weight(base: nn.Linear) -> Tensor:
    """W (out, in) in fp32; of a quantised layer as it is on disk."""
    return (base.read_full() if isinstance(base, QuantizedLinear) else base.weight).float()


def lora_layers(model: PeftModel) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


def save_adapter(model: PeftModel, folder: Path, initial: Mapping[str, Tensor]) -> None:
    """A PEFT folder for the untouched base; `initial` is what `start` returned."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    if not initial:
        return
    tensors = {
        name: tensor.cpu() for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    for name, first in initial.items():
        joined = [tensors[name], first] if ".lora_A." in name else [tensors[name], -first]
        tensors[name] = torch.cat(joined, dim=0 if ".lora_A." in name else 1)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS, {"format": "pt"}
    )
    doubled(model.peft_config["default"]).save_pretrained(str(folder))


def doubled(config: Any) -> Any:
    """The PEFT config for twice the rank at the same scale, alpha / r or alpha / sqrt(r)."""
    config = copy.deepcopy(config)
    factor = math.sqrt(2) if config.use_rslora else 2
    config.r *= 2
    config.lora_alpha *= factor
    config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    config.alpha_pattern = {key: factor * alpha for key, alpha in config.alpha_pattern.items()}
    config.inference_mode = True
    return config
