"""Training with products in 16-bit integers: nearer to fp32 than bf16 is, on every base that it reads, and repeatable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.engine.lora.integer_products import library_or_reason
from lorasmith.engine.lora.quantized import AS_STORED, Quantization
from lorasmith.engine.models import precision
from lorasmith.engine.models.decoder import PackedDecoder
from lorasmith.engine.models.packing import pack
from lorasmith.engine.models.quantized_loading import load_quantized_model
from lorasmith.engine.training.computation import checked_decoder
from lorasmith.errors import Interrupted, InvalidSpec
from tests.engine.decoder_cases import (
    FAMILIES,
    LENGTHS,
    adapted,
    adapter_gradients,
    distances,
    fp32_and_autocast,
    needs_integers,
    random_rows,
    rounded_model,
    tiny_base,
)
from tests.engine.small_jobs import assert_same_bits, events, run_engine, stop_and_resume, stop_at_step

Job = Callable[..., Path]
pytestmark = needs_integers
BESIDE_BF16 = 0.5  # of the distance of PEFT under autocast; it is a fifth of it and less


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_nearer_than_those_of_bf16(family: str) -> None:
    rows = random_rows(LENGTHS)
    nats, truth, bounds = fp32_and_autocast(family, rows)
    model = rounded_model(family, torch.float32)
    decoder = PackedDecoder(checked_decoder(model, 97, "int16"))
    assert set(decoder.decoder.paths.values()) == {"int16"}
    assert decoder.gradients(pack(rows), 0.01, None) == pytest.approx(nats, rel=1e-3)
    ours = adapter_gradients(model)
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    for distance, bound in zip(distances(ours, truth), bounds, strict=True):
        assert 1e-5 < distance <= BESIDE_BF16 * bound  # what is nearer is fp32


@pytest.mark.parametrize("quantization", [AS_STORED, Quantization("nf4"), Quantization("int8")], ids=str)
def test_every_base_is_multiplied_in_integers(tmp_path: Path, quantization: Quantization) -> None:
    """With the gradients of the same base in fp32, a thousandth apart."""
    tiny_base("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    rows = random_rows(LENGTHS)
    found = []
    for wanted in ("fp32", "int16"):
        torch.manual_seed(4)  # A
        model = adapted(load_quantized_model(tmp_path, torch.float32, quantization))
        decoder = PackedDecoder(checked_decoder(model, 97, "fp32" if wanted == "fp32" else "int16"))
        decoder.gradients(pack(rows), 0.01, None)
        found.append(adapter_gradients(model))
    assert set(decoder.decoder.paths.values()) == {"int16" if quantization == AS_STORED else quantization.kind}
    assert 1e-5 < distances(found[1], found[0])[0] < 5e-3


@pytest.mark.parametrize("base", ["half", "full"])
def test_a_stopped_and_resumed_run_has_the_bits_of_the_uninterrupted_one(
    bf16_folder: Path, qwen2_folder: Path, training_job: Job, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bf16_folder if base == "half" else qwen2_folder
    settings: dict[str, Any] = {"max_steps": 7, "precision": "int16"}
    whole, stopped = training_job(folder, "whole", **settings), training_job(folder, "stopped", **settings)
    result = run_engine(whole)
    assert result["precision"] == "int16"
    assert set(result["paths"]) == {"int16"}
    assert result["training_loss"][-1] < result["training_loss"][0]
    stop_and_resume(stopped, monkeypatch)
    assert_same_bits(whole, stopped)
    made = json.loads((whole / "machine.json").read_text(encoding="utf-8"))
    assert made["weights"] == ("stored" if base == "half" else "converted")
    assert made["memory"] == "lean"


def test_through_peft_it_is_fp32_and_says_so(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [training_job(qwen2_folder, wanted, max_steps=2, precision=wanted) for wanted in ("fp32", "int16")]
    monkeypatch.setattr("lorasmith.engine.models.families.FAMILIES", ())
    results = [run_engine(job) for job in jobs]
    assert [result["precision"] for result in results] == ["fp32", "fp32"]
    assert_same_bits(*jobs)


@pytest.mark.parametrize("through_peft", [False, True])
def test_packed_weights_that_were_asked_for_are_said_to_be_without_effect(
    qwen2_folder: Path, training_job: Job, through_peft: bool
) -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "mlp", "use_dora": through_peft}
    job = training_job(qwen2_folder, max_steps=2, precision="int16", memory="fast", lora=lora)
    run_engine(job)
    said = (
        "training.precision=int16, training.memory=fast" if through_peft else "training.memory=fast is without effect"
    )
    assert any("without effect" in event["text"] and said in event["text"] for event in events(job, "note"))


def test_a_run_that_began_with_it_does_not_go_on_otherwise(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training_job(qwen2_folder, max_steps=2, precision="auto")
    (job / "machine.json").write_text(json.dumps({"precision": "int16"}), encoding="utf-8")
    monkeypatch.setattr(precision, "why_no_integers", lambda: "the CPU has no AVX-512 VNNI")
    with pytest.raises(InvalidSpec, match="cannot go on here: .*the CPU has no AVX-512 VNNI"):
        run_engine(job)
    assert not (job / "adapter").exists()


def test_a_run_whose_spec_names_another_precision_by_now_goes_on_in_that(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    job = training_job(qwen2_folder, max_steps=4, precision="int16")
    with monkeypatch.context() as patched:
        stop_at_step(2, patched)
        with pytest.raises(Interrupted):
            run_engine(job)
    order = json.loads((job / "job.json").read_text(encoding="utf-8"))
    order["spec"]["training"]["precision"] = "fp32"
    (job / "job.json").write_text(json.dumps(order), encoding="utf-8")
    monkeypatch.setenv("PATH", str(tmp_path))  # without a compiler
    library_or_reason.cache_clear()
    try:
        result = run_engine(job)
    finally:
        library_or_reason.cache_clear()
    assert result["precision"] == "fp32"
    assert result["total_steps"] == 4
    assert any("precision was int16 and is fp32" in event["text"] for event in events(job, "warning"))
