"""Optimizers by name, over groups of parameters that have their own share of the rate."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lorasmith.engine.optional_imports import show_bitsandbytes
from lorasmith.errors import InvalidSpec, MissingExtra
from lorasmith.schemas.training import OptimizerName

Groups = list[dict[str, Any]]


def build_optimizer(
    name: OptimizerName,
    parameters: Mapping[str, nn.Parameter],
    *,
    rate: float,
    weight_decay: float,
    lora_plus_ratio: float | None = None,
) -> Optimizer:
    """Raises `InvalidSpec` for weights that it cannot train, `MissingExtra` where a package is not installed."""
    if name == "muon":
        check_matrices(parameters)
    return OPTIMIZERS[name](parameter_groups(parameters, weight_decay, lora_plus_ratio or 1.0), rate)


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float, b_factor: float) -> Groups:
    """One group for each pair of rate and decay; the order of the parameters stays.

    Every B learns `b_factor` times as fast (LoRA+). What is no matrix, as DoRA's lengths or a norm, does not decay.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        factor = b_factor if ".lora_B." in name or ".lora_embedding_B." in name else 1.0
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((factor, decay), {"params": [], "rate_factor": factor, "weight_decay": decay})
        group["params"].append(parameter)
    return list(groups.values())


def set_rate(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def check_matrices(parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        if parameter.ndim != 2:
            raise InvalidSpec(
                f"muon trains 2-D weights alone, and {name} has the shape {tuple(parameter.shape)}",
                hint="--set training.optimizer=adamw, or train without use_dora and modules_to_save",
            )


def adamw(groups: Groups, rate: float) -> Optimizer:
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def adamw_8bit(groups: Groups, rate: float) -> Optimizer:
    optimizer: Optimizer = from_bitsandbytes("adamw", "AdamW8bit", "adamw_8bit")(groups, lr=rate)
    return optimizer


def adafactor(groups: Groups, rate: float) -> Optimizer:
    """The rate is meant as it is, as in the transformers trainer, not times the weight's size: B starts at zero.

    Only a weight whose root mean square is above 1 has its rate times that. The floor of squared gradients is transformers' 1e-30:
    that of torch, 1.4e-14, is above those of a large adapter once they are clipped.
    """
    return torch.optim.Adafactor(groups, lr=rate, eps=(1e-15, 1.0))


def lion(groups: Groups, rate: float) -> Optimizer:
    """Steps of one length, sign(0.9 m + 0.1 g), with m in fp32."""
    optimizer: Optimizer = from_bitsandbytes("lion", "Lion32bit", "lion")(groups, lr=rate)
    return optimizer


def from_bitsandbytes(module: str, name: str, optimizer: OptimizerName) -> Any:
    """A class of an extra that is slow to import. Raises `MissingExtra`."""
    show_bitsandbytes()
    try:
        return getattr(importlib.import_module(f"bitsandbytes.optim.{module}"), name)
    except ImportError as error:
        raise MissingExtra(f"optimizer {optimizer}", "quant") from error


def muon(groups: Groups, rate: float) -> Optimizer:
    """Steps as long as AdamW's, so that its rates serve."""
    return torch.optim.Muon(groups, lr=rate, adjust_lr_fn="match_rms_adamw")


OPTIMIZERS: dict[OptimizerName, Callable[[Groups, float], Optimizer]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "adafactor": adafactor,
    "lion": lion,
    "muon": muon,
}
