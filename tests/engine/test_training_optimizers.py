"""Optimizers, each against torch, transformers or a formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.optimization import Adafactor

from lorasmith.engine.training.checkpoints import whole_checkpoints
from lorasmith.engine.training.optimizers import build_optimizer, set_rate
from lorasmith.errors import InvalidSpec, MissingExtra
from tests.engine.small_jobs import (
    assert_same_bits,
    run_engine,
    stop_and_resume,
)

Job = Callable[..., Path]


def low_rank(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {
        "q_proj.lora_A.default.weight": nn.Parameter(torch.randn(4, 32, dtype=dtype) * 0.5),
        "q_proj.lora_B.default.weight": nn.Parameter(torch.randn(32, 4, dtype=dtype) * 0.1),
        "q_proj.lora_magnitude_vector.default.weight": nn.Parameter(torch.rand(32, dtype=dtype)),
    }


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    torch.manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn_like(parameter)


def test_lora_plus_is_adamw_with_a_faster_b() -> None:
    """Two updates by the formula of AdamW, in float64; what is no matrix does not decay."""
    parameters, decay, ratio = low_rank(torch.float64), 0.1, 16.0
    by_hand = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    first, second = ({name: torch.zeros_like(value) for name, value in by_hand.items()} for _ in range(2))
    optimizer = build_optimizer("adamw", parameters, rate=1.0, weight_decay=decay, lora_plus_ratio=ratio)
    for step, rate in enumerate((1e-3, 5e-4), start=1):
        give_gradients(parameters, step)
        for name, parameter in parameters.items():
            gradient = parameter.grad
            assert gradient is not None
            own = rate * (ratio if "lora_B" in name else 1)
            by_hand[name] *= 1 - own * (decay if parameter.ndim > 1 else 0)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            scaled = (second[name] / (1 - 0.999**step)).sqrt() + 1e-8
            by_hand[name] -= own * first[name] / (1 - 0.9**step) / scaled
        set_rate(optimizer, rate)
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach(), by_hand[name], atol=1e-12, rtol=0)  # float64


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-7])
def test_adafactor_is_that_of_the_transformers_trainer(size: float) -> None:
    """Also where gradients are small, as those of a large adapter are once they are clipped, and become smaller."""
    ours, theirs = low_rank(), low_rank()
    optimizer = build_optimizer("adafactor", ours, rate=1e-3, weight_decay=0.0)
    reference = Adafactor(theirs.values(), lr=1e-3, scale_parameter=False, relative_step=False)
    for step in range(6):
        for parameters in (ours, theirs):
            give_gradients(parameters, step)
            for parameter in parameters.values():
                assert parameter.grad is not None
                parameter.grad *= size / (1 + step)
        optimizer.step()
        reference.step()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], atol=1e-6, rtol=0)  # float32, six updates of up to 1e-3


def test_the_8_bit_optimizer_stays_near_adamw() -> None:
    pytest.importorskip("bitsandbytes")
    ours, theirs = ({"big.lora_A.default.weight": nn.Parameter(torch.zeros(64, 128))} for _ in range(2))
    optimizer = build_optimizer("adamw_8bit", ours, rate=1e-2, weight_decay=0.0)
    reference = build_optimizer("adamw", theirs, rate=1e-2, weight_decay=0.0)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
    ((name, parameter),) = ours.items()
    assert {value.dtype for key, value in optimizer.state[parameter].items() if key in ("state1", "state2")} == {
        torch.uint8
    }
    assert (parameter - theirs[name]).norm() / theirs[name].norm() < 0.1  # 8-bit states


def test_lion_is_the_formula_of_its_paper() -> None:
    """Algorithm 2 of https://arxiv.org/abs/2302.06675 in float64: decay, the sign of a mean, then the momentum."""
    pytest.importorskip("bitsandbytes")
    parameters, decay, ratio = low_rank(), 0.1, 16.0
    by_hand = {name: parameter.detach().double() for name, parameter in parameters.items()}
    momentum = {name: torch.zeros_like(value) for name, value in by_hand.items()}
    optimizer = build_optimizer("lion", parameters, rate=1.0, weight_decay=decay, lora_plus_ratio=ratio)
    for step, rate in enumerate((1e-3, 5e-4, 2e-4)):
        give_gradients(parameters, step)
        for name, parameter in parameters.items():
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            own = rate * (ratio if "lora_B" in name else 1)
            by_hand[name] *= 1 - own * (decay if parameter.ndim > 1 else 0)
            by_hand[name] -= own * torch.sign(0.9 * momentum[name] + 0.1 * gradient)
            momentum[name] = 0.99 * momentum[name] + 0.01 * gradient
        set_rate(optimizer, rate)
        optimizer.step()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.detach().double(), by_hand[name], atol=1e-6, rtol=0)  # float32, 3 updates


def test_muon_refuses_what_is_no_matrix_and_matches_the_length_of_adamws_steps() -> None:
    parameters = low_rank()
    with pytest.raises(InvalidSpec, match=r"muon trains 2-D weights alone, and q_proj.lora_magnitude_vector.*\(32,\)"):
        build_optimizer("muon", parameters, rate=1e-3, weight_decay=0.0)
    del parameters["q_proj.lora_magnitude_vector.default.weight"]
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = build_optimizer("muon", parameters, rate=1e-3, weight_decay=0.0)
    give_gradients(parameters, 0)
    optimizer.step()
    for name, parameter in parameters.items():
        root_mean_square = (parameter.detach() - before[name]).square().mean().sqrt().item()
        # an orthogonal (4, 32) has the mean square 4 / 128; times (0.2 sqrt(32))² that is 0.2²; five iterations are near
        assert root_mean_square == pytest.approx(0.2e-3, rel=0.4)


@pytest.mark.parametrize(("name", "module"), [("adamw_8bit", "adamw"), ("lion", "lion")])
def test_a_missing_extra_is_named(name: Any, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, f"bitsandbytes.optim.{module}", None)
    with pytest.raises(MissingExtra, match=f"optimizer {name} needs the extra `quant`"):
        build_optimizer(name, low_rank(), rate=1e-3, weight_decay=0.0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "adafactor", "lion", "muon"])
def test_every_optimizer_resumes_bit_for_bit(
    qwen2_folder: Path, training_job: Job, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if optimizer in ("adamw_8bit", "lion"):
        pytest.importorskip("bitsandbytes")
    settings: dict[str, Any] = {"optimizer": optimizer, "max_steps": 8, "lora_plus_ratio": 4.0, "weight_decay": 1e-5}
    settings["lora"] = {"rank": 64, "alpha": 64, "dropout": 0.1, "target_modules": "all"}  # 64 × 64: enough for 8 bits
    whole, stopped = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "stopped", **settings)
    expected = run_engine(whole)
    resumed = stop_and_resume(stopped, monkeypatch)
    assert resumed["training_loss"] == expected["training_loss"]
    assert expected["training_loss"][-1] < expected["training_loss"][0]
    assert_same_bits(whole, stopped)
    state = load_file(whole_checkpoints(whole)[-1] / "state.safetensors")
    assert (torch.uint8 in {tensor.dtype for tensor in state.values()}) == (optimizer == "adamw_8bit")
