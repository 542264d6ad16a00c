"""A whole step on a GPU that only has shapes: each tensor that is left on the CPU is an error.

Numbers need a real one: the tests at the end run where torch has CUDA, and are skipped, in CI too, where no GPU can be had.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.engine.lora import quantized
from lorasmith.engine.lora.dropout import RowDropout
from lorasmith.engine.lora.quantized import AS_STORED, Quantization, quantize
from lorasmith.engine.models.decoder import PackedDecoder
from lorasmith.engine.models.families import read_decoder
from lorasmith.engine.models.packing import pack
from lorasmith.engine.models.quantized_loading import load_quantized_model
from lorasmith.engine.reporting import SilentReporter
from lorasmith.engine.training.batches import plan_steps
from lorasmith.engine.training.checkpoints import Progress, trainable
from lorasmith.engine.training.choices import Choices
from lorasmith.engine.training.computation import PackedComputation, PeftComputation
from lorasmith.engine.training.devices import Devices
from lorasmith.engine.training.loop import TrainingRun, optimizer_step
from lorasmith.engine.training.loss import CompletionLoss
from lorasmith.engine.training.optimizers import build_optimizer
from lorasmith.schemas.training import TrainingSettings
from tests.engine.decoder_cases import FAMILIES, adapted, adapter_gradients, random_rows, tiny_base, worst_difference
from tests.engine.fake_gpu import GPU, fake_gpu, move_to_gpu, moved

LENGTHS = [33, 7, 61, 2, 18, 40]
NF4 = Quantization("nf4")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU, and none can be installed")


def shared_rows() -> list[Any]:
    """Rows of which two begin alike."""
    rows = random_rows(LENGTHS)
    rows[2].ids[:32] = rows[0].ids[:32]
    return rows


def one_step(model: Any, folder: Path, *, recompute: bool = False) -> TrainingRun:
    """Forward, loss, gradients, clipping and the optimizer, and a validation."""
    rows = shared_rows()
    run = TrainingRun(
        job=folder,
        model=model,
        optimizer=build_optimizer("adamw", trainable(model), rate=1e-2, weight_decay=0.01),
        initial={},
        computation=PackedComputation(read_decoder(model), seed=0, micro_batch_tokens=100, recompute=recompute),
        plan=plan_steps(len(rows), batch_size=len(rows), accumulation=1, epochs=1, max_steps=None, seed=0),
        settings=TrainingSettings(max_skipped_steps=0),
        train=rows,
        validation=rows,
        progress=Progress(),
        choices=Choices(folder, SilentReporter(folder), Devices()),
    )
    optimizer_step(run, SilentReporter(folder), 1e-2)
    return run


def base_of(family: str, quantization: Quantization | None, folder: Path) -> Any:
    base = tiny_base(family, num_hidden_layers=2)
    if quantization is None:
        return base
    base.save_pretrained(folder / "base")
    return load_quantized_model(folder / "base", torch.float32, quantization)


@pytest.mark.parametrize(
    ("family", "dropout", "quantization"),
    [
        *((family, 0.0, None) for family in FAMILIES),
        ("qwen3", 0.1, None),
        ("llama", 0.0, NF4),
        ("qwen2", 0.1, Quantization("int8")),
        ("gemma", 0.0, AS_STORED),
    ],
    ids=str,
)
def test_a_step_leaves_no_tensor_on_the_cpu_and_waits_once_for_each_micro_batch(
    family: str, dropout: float, quantization: Quantization | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "bitsandbytes_dequantize", lambda: None)
    model = adapted(base_of(family, quantization, tmp_path), dropout=dropout)
    with fake_gpu() as gpu:
        move_to_gpu(model)
        run = one_step(model, tmp_path)
        batches = run.computation.micro_batches(range(len(LENGTHS)), run.train)
        assert gpu.reads == len(batches) + 1  # and for the length of the gradient
        states = [value for state in run.optimizer.state.values() for value in state.values()]
        assert {tensor.device.type for tensor in [*trainable(model).values(), *states]} == {GPU.type}
        assert len(states) == 3 * len(trainable(model))
        run.computation.loss(range(len(LENGTHS)), run.validation)


def test_layers_computed_again_stay_on_the_gpu(tmp_path: Path) -> None:
    model = adapted(tiny_base("qwen3"), dropout=0.1)
    with fake_gpu():
        move_to_gpu(model)
        one_step(model, tmp_path, recompute=True)


def test_a_step_through_peft_stays_on_the_gpu_and_waits_for_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which the device that stands for it lacks
    monkeypatch.setattr(torch, "allclose", lambda *_, **__: True)  # of values
    model, rows = adapted(tiny_base("olmo2"), dropout=0.1), random_rows(LENGTHS)
    with fake_gpu(masked=5) as gpu:
        move_to_gpu(model)
        loss = CompletionLoss(model.get_base_model(), 97)
        computation = PeftComputation(model, loss, seed=0, pad_id=0, precision="fp32", batch_rows=2)
        computation.gradients([0, 1], rows, scale=0.1, step=0)
        assert gpu.reads == 1
        computation.loss([0, 2], rows)
        assert {gradient.device for gradient in adapter_gradients(model).values()} == {GPU}


def test_a_tensor_that_is_left_on_the_cpu_is_found() -> None:
    model, rows = adapted(tiny_base("qwen2"), dropout=0.1), pack(random_rows(LENGTHS))
    with fake_gpu():
        move_to_gpu(model)
        decoder = PackedDecoder(read_decoder(model))
        on_the_cpu = RowDropout(0, 0, range(len(LENGTHS)), rows.lengths)
        with pytest.raises(RuntimeError, match="at least two devices, meta and cpu"):
            decoder.gradients(rows, 0.01, on_the_cpu)


def test_bitsandbytes_is_asked_for_4_bits_on_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(quantized, "bitsandbytes_dequantize", lambda: lambda codes, **given: asked.append(given))
    weight, no_whole_block = quantize(torch.randn(64, 128), NF4), quantize(torch.randn(3, 6), NF4)
    weight.dequantize(torch.empty(64, 128))
    assert not asked
    with fake_gpu():
        out = torch.empty(64, 128, dtype=torch.bfloat16, device=GPU)
        assert moved(weight).dequantize(out) is out
        moved(no_whole_block).dequantize(torch.empty(3, 6, device=GPU))
    assert [(given["quant_type"], given["out"] is out) for given in asked] == [("nf4", True)]
    inspect.signature(pytest.importorskip("bitsandbytes").functional.dequantize_4bit).bind(weight.codes, **asked[0])


@needs_gpu
@pytest.mark.parametrize("quantization", [None, NF4, Quantization("int8")], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_gpu_computes_the_gradients_of_the_cpu(
    family: str, dropout: float, quantization: Quantization | None, tmp_path: Path
) -> None:
    rows, found, nats = shared_rows(), [], []
    for device in ("cpu", "cuda"):
        base = base_of(family, quantization, tmp_path)
        if quantization is not None:
            base = load_quantized_model(tmp_path / "base", torch.float32, quantization, torch.device(device))
        model = adapted(base.to(device), dropout=dropout)
        computation = PackedComputation(read_decoder(model), seed=0, micro_batch_tokens=100)
        batches = computation.micro_batches(range(len(rows)), rows)
        nats.append(sum(computation.gradients(batch, rows, scale=0.01, step=0) for batch in batches))
        found.append({name: gradient.cpu() for name, gradient in adapter_gradients(model).items()})
    assert nats[1] == pytest.approx(nats[0], rel=1e-5)  # fp32
    assert worst_difference(found[1], found[0]) <= 1e-4
