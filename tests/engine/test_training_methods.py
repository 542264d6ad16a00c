"""Variants of LoRA and their first weights, each against PEFT or a closed form."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lorasmith.engine.lora.config import LoRAConfig, fit
from lorasmith.engine.models.loading import load_adapter, load_model
from lorasmith.engine.reporting import Reporter, SilentReporter
from lorasmith.engine.training import run as run_module
from lorasmith.engine.training.checkpoints import whole_checkpoints
from lorasmith.engine.training.initial import olora, pissa, start
from lorasmith.engine.training.loop import TrainingRun, train
from lorasmith.errors import Interrupted, InvalidSpec
from tests.engine.small_jobs import assert_same_bits, events, run_engine, stop_at_step, weights

Job = Callable[..., Path]
IDS = torch.arange(3, 35).unsqueeze(0)
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all"}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits that the model had in memory when training was over, before anything was written; one entry per run."""
    logits: list[torch.Tensor] = []

    def training(run: TrainingRun, report: Reporter) -> bool:
        finished = train(run, report)
        if finished:
            with torch.no_grad():
                logits.append(run.model.eval()(IDS).logits)
        return finished

    monkeypatch.setattr(run_module, "train", training)
    return logits


# PEFT's file sorts the keys, so that the other one would come first
OVERLAPPING = {
    "rank_pattern": {"q_proj": 6, r"layers\.0\..*": 2},
    "alpha_pattern": {"q_proj": 3, r"layers\.0\..*": 30},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "overlapping_patterns": OVERLAPPING,
    "overlapping_patterns_pissa": {**OVERLAPPING, "init": "pissa"},
    "patterns": {"rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\..*": 2}, "alpha_pattern": {"o_proj": 3}},
    "one_layer": {"layers": [1], "use_rslora": True},
    "dora": {"use_dora": True, "rank_pattern": {"v_proj": 2}},
    "trained_head": {"modules_to_save": ["lm_head", "norm"]},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "pissa": {"init": "pissa", "rank_pattern": {"q_proj": 6}, "alpha_pattern": {"o_proj": 3}},
    "pissa_rslora": {"init": "pissa", "use_rslora": True, "alpha_pattern": {"o_proj": 3}},
    "pissa_dora": {"init": "pissa", "use_dora": True},
    "olora": {"init": "olora", "layers": [0], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_loads_is_the_model_that_was_trained(
    qwen2_folder: Path, training_job: Job, trained: list[torch.Tensor], variant: str
) -> None:
    lora = {**LORA, **VARIANTS[variant]}
    folder = training_job(qwen2_folder, lora=lora, max_steps=4)
    result = run_engine(folder)
    assert result["training_loss"][-1] < result["training_loss"][0]
    newest = whole_checkpoints(folder)[-1]
    with torch.no_grad():
        for adapter in (folder / "adapter", newest):
            base = AutoModelForCausalLM.from_pretrained(qwen2_folder)
            loaded = PeftModel.from_pretrained(base, adapter).eval()(IDS).logits
            torch.testing.assert_close(loaded, trained[0], atol=1e-5, rtol=0)  # float32
        ours = load_adapter(load_model(qwen2_folder), folder / "adapter")(IDS).logits
        before = load_model(qwen2_folder)(IDS).logits
    torch.testing.assert_close(ours, trained[0], atol=1e-5, rtol=0)
    assert (trained[0] - before).abs().max() > 1e-2
    packed = not {"use_dora", "modules_to_save"} & lora.keys()
    assert bool(events(folder, "paths")) == packed


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init": "pissa"}])
def test_the_variants_train_in_bf16_with_fp32_weights(
    qwen2_folder: Path, training_job: Job, lora: dict[str, Any]
) -> None:
    folder = training_job(qwen2_folder, lora={**LORA, **lora}, max_steps=3, precision="bf16")
    run_engine(folder)
    assert {tensor.dtype for tensor in weights(folder).values()} == {torch.float32}
    notes = [event["text"] for event in events(folder, "note")]
    assert any("init pissa in bf16: the base is rounded once more" in note for note in notes) == ("init" in lora)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_moved_start_is_pefts(qwen2_folder: Path, tmp_path: Path, init: Any) -> None:
    config = LoRAConfig(r=4, alpha=16, dropout=0.0, target_modules=["q_proj", "down_proj"], init=init)
    reference = get_peft_model(load_model(qwen2_folder), config.to_peft_config())
    config.init = "default"
    ours = get_peft_model(load_model(qwen2_folder), config.to_peft_config())
    assert isinstance(ours, PeftModel)
    start(ours, init, tmp_path, SilentReporter(tmp_path))
    expected = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=0)  # float32, 64 terms
    with torch.no_grad():
        untouched = load_model(qwen2_folder)(IDS).logits
        torch.testing.assert_close(ours.eval()(IDS).logits, untouched, atol=1e-5, rtol=0)


def test_large_matrices_are_decomposed_by_the_randomised_method(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 4) @ torch.randn(4, 32) + 1e-3 * torch.randn(48, 32)
    exact = torch.mm(*reversed(pissa(weight, 4, 2.0)))
    monkeypatch.setattr("lorasmith.engine.training.initial.EXACT_UP_TO", 8)
    randomised = torch.mm(*reversed(pissa(weight, 4, 2.0)))
    torch.testing.assert_close(randomised, exact, atol=1e-5, rtol=0)  # float32, 16 power iterations
    torch.testing.assert_close(2.0 * exact, weight, atol=0.02, rtol=0)  # the noise is left
    _, basis = olora(weight, 4, 2.0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [{"init": "pissa"}, {"use_dora": True, "modules_to_save": ["lm_head"]}])
def test_a_variant_resumes_bit_for_bit(
    qwen2_folder: Path, training_job: Job, lora: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"lora": {**LORA, "dropout": 0.1, **lora}, "max_steps": 8}
    whole, stopped = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "stopped", **settings)
    run_engine(whole)
    with monkeypatch.context() as patched:
        stop_at_step(5, patched)
        with pytest.raises(Interrupted):
            run_engine(stopped)
    monkeypatch.setattr("lorasmith.engine.training.initial.factors", None)  # kept, so not computed again
    run_engine(stopped)
    assert_same_bits(whole, stopped)


def with_a_flipped_bit(file: Path) -> str:
    stored = bytearray(file.read_bytes())
    stored[-2] ^= 0x10  # in the last value, so that it is still a number
    file.write_bytes(stored)
    return f"{file} is damaged: it does not match its checksum; {AGAIN}, with the same bytes as at the beginning"


def truncated(file: Path) -> str:
    os.truncate(file, 5000)
    return f"{file} is damaged: it does not match its checksum; {AGAIN}, with the same bytes as at the beginning"


def without_its_checksum(file: Path) -> str:
    with_a_flipped_bit(file)
    file.with_suffix(".sha256").unlink()
    return f"{file.with_suffix('.sha256')} is missing; {AGAIN}, and may be rounded otherwise than at the beginning"


AGAIN = "the first A and B are computed again from the base"


@pytest.mark.parametrize(
    ("init", "quantization", "harm"),
    [
        ("pissa", None, with_a_flipped_bit),
        ("pissa", None, truncated),
        ("olora", None, without_its_checksum),
        ("loftq", "nf4", with_a_flipped_bit),
    ],
)
def test_a_damaged_start_is_named_and_computed_again(
    qwen2_folder: Path,
    training_job: Job,
    init: str,
    quantization: str | None,
    harm: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"lora": {**LORA, "init": init}, "max_steps": 8, "quantization": quantization}
    whole, hurt = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "hurt", **settings)
    run_engine(whole)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stop_at_step(5, patched)
        run_engine(hurt)
    before = (hurt / "initial.safetensors").read_bytes()
    warning = harm(hurt / "initial.safetensors")
    run_engine(hurt)
    assert [event["text"] for event in events(hurt, "warning")] == [warning]
    assert (hurt / "initial.safetensors").read_bytes() == before
    assert_same_bits(whole, hurt)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"layers": [1, 2]}, "there is no layer 2 to adapt"),
        ({"rank_pattern": {"q_porj": 2}}, "rank_pattern 'q_porj' matches no adapted module; did you mean 'q_proj'"),
        ({"alpha_pattern": {"(": 2}}, r"alpha_pattern '\(' is no regular expression: "),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save 'lm_haed' matches no module; did you mean 'lm_head'"),
        ({"modules_to_save": ["q_proj"]}, "'q_proj' is in target_modules and in modules_to_save"),
        ({"init": "olora", "rank": 33}, r"init 'olora' takes a rank of at most 32 for '.*k_proj', got 33"),
        ({"init": "orthogonal", "rank": 3}, "init 'orthogonal' takes an even rank, got 3 for "),
    ],
)
def test_a_setting_without_a_place_in_the_model_is_an_error(
    qwen2_folder: Path, lora: dict[str, Any], message: str
) -> None:
    config = LoRAConfig(**{"target_modules": "all", "r": lora.pop("rank", 4), **lora})
    with pytest.raises(InvalidSpec, match=message):
        fit(config, load_model(qwen2_folder))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "pisa"}, "no init 'pisa'; did you mean 'pissa'"),
        ({"layers": []}, r"layers must be numbers from 0, at least one, got \[\]"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must hold ranks of at least 1, got 0 for 'q_proj'"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern must hold values above 0, got 0 for 'q_proj'"),
    ],
)
def test_a_config_checks_its_values(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec, match=message):
        LoRAConfig(**values)


def test_peft_gets_every_field() -> None:
    config = LoRAConfig(
        use_dora=True,
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 8.0},
        layers=[0, 2],
        modules_to_save=["lm_head"],
        init="gaussian",
    )
    assert LoRAConfig.from_dict(config.to_dict()) == config
    peft = config.to_peft_config()
    assert (peft.use_dora, peft.rank_pattern, peft.alpha_pattern) == (True, {"q_proj": 4}, {"q_proj": 8})
    assert (peft.layers_to_transform, peft.modules_to_save, peft.init_lora_weights) == ([0, 2], ["lm_head"], "gaussian")
