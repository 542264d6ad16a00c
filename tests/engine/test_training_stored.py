"""Runs that compute in fp32 on weights that stay in the 16 bits of their file: less memory, the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lorasmith.engine.lora import frozen
from lorasmith.engine.lora.quantized import AS_STORED
from lorasmith.engine.lora.quantized_linear import quantized_bytes, quantized_elements
from lorasmith.engine.models.generation import stream_answer
from lorasmith.engine.models.loading import load_model, load_within_memory
from lorasmith.engine.models.precision import Precision, choose_weights
from lorasmith.engine.models.quantized_loading import half_bytes
from lorasmith.engine.models.workspace import Workspace
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.choices import Choices, choose_base
from lorasmith.engine.training.devices import Devices
from lorasmith.schemas.training import TrainingSpec
from tests.engine.small_jobs import assert_same_bits, events, run_engine, stop_and_resume, tie_ends

Job = Callable[..., Path]


@pytest.fixture(params=["bf16", "fp16"])
def half_folder(request: pytest.FixtureRequest, bf16_folder: Path, tmp_path: Path) -> Path:
    if request.param == "bf16":
        return bf16_folder
    folder = shutil.copytree(bf16_folder, tmp_path / "fp16")
    AutoModelForCausalLM.from_pretrained(bf16_folder, dtype=torch.float16).save_pretrained(folder)
    return folder


def converted_job(training_job: Job, folder: Path, name: str, **settings: Any) -> Path:
    """Whose weights are made fp32 when they are loaded, as another machine would have chosen."""
    job = training_job(folder, name, **settings)
    (job / "machine.json").write_text(json.dumps({"weights": "converted"}), encoding="utf-8")
    return job


@pytest.mark.parametrize("recompute", [False, True])
def test_the_adapter_has_the_bits_of_a_run_on_fp32_weights(
    half_folder: Path, training_job: Job, recompute: bool
) -> None:
    settings = {"max_steps": 6, "gradient_checkpointing": recompute}
    stored, converted = (
        training_job(half_folder, "stored", **settings),
        converted_job(training_job, half_folder, "converted", **settings),
    )
    results = [run_engine(stored), run_engine(converted)]
    assert [set(events(job, "paths")[0]["modules"].values()) for job in (stored, converted)] == [{"stored"}, {"plain"}]
    assert_same_bits(stored, converted)
    assert results[0]["training_loss"] == results[1]["training_loss"]
    assert results[0]["validation_loss"] == results[1]["validation_loss"]
    assert results[0]["total_parameters"] == results[1]["total_parameters"]


def test_a_resumed_run_keeps_them(half_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, stopped = training_job(half_folder, "whole", max_steps=7), training_job(half_folder, "stopped", max_steps=7)
    run_engine(whole)
    stop_and_resume(stopped, monkeypatch)
    assert_same_bits(whole, stopped)
    assert json.loads((stopped / "machine.json").read_text())["weights"] == "stored"


@pytest.mark.parametrize(("lora", "base"), [({"use_dora": True}, "half"), ({"init": "pissa"}, "half"), ({}, "full")])
def test_what_changes_or_measures_the_base_gets_it_in_fp32(
    half_folder: Path, qwen2_folder: Path, training_job: Job, lora: dict[str, Any], base: str
) -> None:
    folder = {"half": half_folder, "full": qwen2_folder}[base]
    job = training_job(folder, lora={"rank": 4, "target_modules": "all", **lora}, max_steps=1)
    run_engine(job)
    assert json.loads((job / "machine.json").read_text())["weights"] == "converted"


def test_through_peft_they_are_the_same_too(half_folder: Path, training_job: Job, tmp_path: Path) -> None:
    folder = shutil.copytree(half_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}), encoding="utf-8")
    stored = training_job(folder, "stored", max_steps=3)
    converted = converted_job(training_job, folder, "converted", max_steps=3)
    for job in (stored, converted):
        assert "attention_dropout" in run_engine(job)["fallback"]
    assert_same_bits(stored, converted)


def test_what_is_quantised_already_is_not_read_as_16_bits(bf16_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bf16_folder, tmp_path / "quantised")
    assert half_bytes(folder) > 0
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert half_bytes(folder) == 0


@pytest.mark.parametrize("tied", [False, True])
def test_they_take_half_of_the_memory_and_tied_ends_are_held_once(
    half_folder: Path, tmp_path: Path, tied: bool
) -> None:
    folder = tie_ends(half_folder, tmp_path / "tied") if tied else half_folder
    model: Any = load_model(folder, torch.float32, AS_STORED)
    embedding = model.model.embed_tokens.weight
    assert (model.lm_head.stored.values.data_ptr() == embedding.data_ptr()) == tied
    assert quantized_bytes(model) + embedding.nbytes == half_bytes(folder)
    assert quantized_bytes(model) == 2 * quantized_elements(model)
    ids = torch.arange(3, 35).unsqueeze(0)
    with torch.no_grad():
        expected = load_model(folder)(ids).logits
        assert expected.dtype == torch.float32
        assert torch.equal(model(ids).logits, expected)


def test_a_model_that_would_fill_the_memory_answers_from_its_file_s_bits(
    half_folder: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    prompt = tokenizer.encode("Count from 3.")
    answers = []
    for model in (load_within_memory(half_folder, "fp32"), load_model(half_folder)):
        answers.append(
            (bool(quantized_elements(model)), list(stream_answer(model, prompt, max_new_tokens=12, stop_ids=set())))
        )
    assert [held for held, _ in answers] == [True, False]
    assert answers[0][1] == answers[1][1]


def test_a_head_in_blocks_is_the_product_with_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "WIDENED_ELEMENTS", 640)
    values, x, gradient = torch.randn(103, 64).bfloat16(), torch.randn(7, 64), torch.randn(7, 103)
    head, workspace = frozen.WidenedMatrix(values), Workspace(torch.float32)
    assert len(head.blocks) == 11
    torch.testing.assert_close(head.forward(x, None, workspace, "out"), x @ values.float().t(), atol=1e-5, rtol=0)
    torch.testing.assert_close(head.backward(gradient, workspace, "back"), gradient @ values.float(), atol=1e-4, rtol=0)
    assert workspace.take("dequantized", 1).untyped_storage().nbytes() == 4 * 640


@pytest.mark.parametrize(("processes", "chosen"), [(1, "converted"), (2, "stored")])
def test_each_process_has_weights_of_its_own(
    bf16_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch, processes: int, chosen: str
) -> None:
    free = 6 * half_bytes(bf16_folder)  # fp32 takes a third of it, and in two processes two thirds
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    job = training_job(bf16_folder, memory="auto")
    spec = TrainingSpec.model_validate(json.loads((job / "job.json").read_text(encoding="utf-8"))["spec"])
    devices = Devices(count=processes)
    monkeypatch.setattr(devices, "agree", lambda value: value)
    choices = Choices(job, Reporter(job), devices)
    assert (choose_base(choices, spec, "fp32", bf16_folder) == AS_STORED) == (chosen == "stored")
    assert choices.made["weights"] == chosen


@pytest.mark.parametrize(
    ("wanted", "precision", "half", "free", "chosen"),
    [
        ("lean", "fp32", 10, 1000, "stored"),
        ("lean", "bf16", 10, 1000, "converted"),  # bf16 weights are computed as they are
        ("lean", "fp32", 0, 1000, "converted"),
        ("auto", "fp32", 249, 1000, "converted"),
        ("auto", "fp32", 251, 1000, "stored"),  # 502 bytes in fp32 are more than half
        ("fast", "fp32", 900, 1000, "converted"),
        ("auto", "int16", 10, 1000, "stored"),  # its products read them as they are
        ("fast", "int16", 10, 1000, "stored"),
        ("auto", "int16", 0, 1000, "converted"),
    ],
)
def test_where_memory_is_short_they_stay(
    wanted: Any, precision: Precision, half: int, free: int, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": free}))
    assert choose_weights(wanted, precision, half) == chosen
