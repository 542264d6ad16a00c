"""Which device a run takes, what it says of it, and what becomes of it when the device is another one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.engine.models.device import choose_device
from lorasmith.engine.models.elementwise import can_compile
from lorasmith.engine.models.precision import choose_memory, choose_precision
from lorasmith.engine.out_of_memory import ran_out_of_memory
from lorasmith.engine.training.checkpoints import place_of_state, trainable
from lorasmith.engine.training.estimation.run import check_device
from lorasmith.engine.training.optimizers import build_optimizer
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.training import TrainingSettings, TrainingSpec
from tests.engine.decoder_cases import adapted, tiny_base
from tests.engine.fake_gpu import GPU, fake_gpu, move_to_gpu
from tests.engine.small_jobs import assert_same_bits, events, run_engine, stop_at_step

Job = Callable[..., Path]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU, and none can be installed")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as choosing it goes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")


def test_auto_takes_the_gpu_that_is_there_for_one_process(a_gpu: None) -> None:
    assert choose_device("auto") == "cuda"
    assert choose_device("auto", processes=2) == "cpu"
    assert choose_device("cpu") == "cpu"


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_loaded(
    no_gpu: None, qwen2_folder: Path, training_job: Job
) -> None:
    folder = training_job(qwen2_folder, device="cuda")
    with pytest.raises(InvalidSpec, match=r"training.device is cuda, and torch .* sees no GPU here") as caught:
        run_engine(folder)
    assert str(caught.value.hint).endswith("or --set training.device=cpu")
    assert not (folder / "events.jsonl").exists()


def test_what_only_a_cpu_has_is_refused_with_a_gpu() -> None:
    with pytest.raises(
        ValueError, match="2 processes share the cores of a CPU, and device is cuda; take 1, or device=cpu"
    ):
        TrainingSettings(device="cuda", processes=2)
    with pytest.raises(ValueError, match="fast is a layout for the products of a CPU, and device is cuda; take lean"):
        TrainingSettings(device="cuda", memory="fast")


def test_a_gpu_takes_bf16_where_it_multiplies_it_and_never_packed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    for supported, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, s=supported: s)
        assert choose_precision("auto", "cuda") == precision
    assert choose_precision("fp32", "cuda") == "fp32"
    assert choose_memory("fast", "fp32", 0, "cuda") == "lean"
    monkeypatch.setattr("lorasmith.engine.models.elementwise.has_triton", lambda: True)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert can_compile("cuda")
    assert not can_compile("cpu")


def test_the_device_is_written_down_and_reported(no_gpu: None, qwen2_folder: Path, training_job: Job) -> None:
    folder = training_job(qwen2_folder, device="auto", max_steps=1)
    result = run_engine(folder)
    assert (result["device"], result["gpu_peak_memory_bytes"]) == ("cpu", None)
    assert json.loads((folder / "machine.json").read_text(encoding="utf-8"))["device"] == "cpu"
    assert [event["device"] for event in events(folder, "paths")] == ["cpu"]


def test_a_run_that_began_on_a_gpu_goes_on_without_it_only_when_told(
    no_gpu: None, qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = training_job(qwen2_folder, device="auto")
    with monkeypatch.context() as patched, pytest.raises(Exception, match="stopped after step 5"):
        stop_at_step(5, patched)
        run_engine(folder)
    machine = folder / "machine.json"
    chosen = json.loads(machine.read_text(encoding="utf-8"))
    machine.write_text(json.dumps({**chosen, "device": "cuda", "gpu": "NVIDIA A100"}), encoding="utf-8")
    with pytest.raises(
        InvalidSpec, match="this run began on a GPU, and cannot go on there: training.device is cuda"
    ) as no:
        run_engine(folder)
    assert str(no.value.hint) == (
        f"training.device: cpu in {folder / 'job.json'} lets it go on here, rounded otherwise"
    )

    order = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    order["spec"]["training"]["device"] = "cpu"
    (folder / "job.json").write_text(json.dumps(order), encoding="utf-8")
    result = run_engine(folder)
    said = [event["text"] for event in events(folder, "warning")]
    assert "device was cuda and is cpu: the run is no longer exactly repeatable" in said
    assert result["total_steps"] == 12
    assert json.loads(machine.read_text(encoding="utf-8"))["device"] == "cpu"


def test_a_run_that_began_before_there_was_a_choice_stays_on_the_cpu(
    qwen2_folder: Path, training_job: Job, a_gpu: None
) -> None:
    folder = training_job(qwen2_folder, device="auto", max_steps=1)
    (folder / "machine.json").write_text(json.dumps({"precision": "fp32"}), encoding="utf-8")
    assert run_engine(folder)["device"] == "cpu"


def test_an_estimate_refuses_a_run_on_a_gpu(a_gpu: None) -> None:
    spec = TrainingSpec(model="starter", data="signatures")
    with pytest.raises(
        InvalidSpec, match="this run would be computed on NVIDIA A100, and only runs on a CPU are estimated"
    ):
        check_device(spec)
    spec.training.device = "cpu"
    check_device(spec)


@pytest.mark.parametrize(("name", "step_on"), [("adamw", GPU.type), ("adafactor", "cpu")])
def test_states_of_an_optimizer_come_back_to_where_it_keeps_them(name: Any, step_on: str) -> None:
    model = adapted(tiny_base("qwen2"))
    with fake_gpu():
        move_to_gpu(model)
        optimizer = build_optimizer(name, trainable(model), rate=1e-3, weight_decay=0.0)
        for parameter in trainable(model).values():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for parameter, state in optimizer.state.items():
            kept = {key: value.device.type for key, value in state.items() if isinstance(value, torch.Tensor)}
            assert kept["step"] == step_on
            assert kept == {key: place_of_state(key, parameter, optimizer).type for key in kept}


def test_memory_that_runs_out_on_a_gpu_is_seen() -> None:
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert ran_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))


@needs_gpu
@pytest.mark.parametrize(
    ("change", "settings"),
    [({}, {}), ({}, {"quantization": "nf4"}), ({"use_dora": True}, {})],
    ids=["lora", "nf4", "through peft"],
)
def test_a_run_on_a_gpu_learns_what_it_learns_on_the_cpu_and_goes_on(
    qwen2_folder: Path,
    training_job: Job,
    change: dict[str, Any],
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all", **change}
    losses = []
    for device in ("cpu", "cuda"):
        result = run_engine(training_job(qwen2_folder, device, lora=lora, device=device, **settings))
        losses.append(result["training_loss"])
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)  # float32, 12 AdamW updates
    assert result["device"] == torch.cuda.get_device_name()
    assert result["gpu_peak_memory_bytes"] > 0

    stopped = training_job(qwen2_folder, "stopped", lora=lora, device="cuda", **settings)
    with monkeypatch.context() as patched, pytest.raises(Exception, match="stopped after step 5"):
        stop_at_step(5, patched)
        run_engine(stopped)
    assert run_engine(stopped)["training_loss"] == pytest.approx(losses[1], abs=2e-3)


@needs_gpu
def test_a_cpu_run_stays_bit_for_bit_where_there_is_a_gpu(qwen2_folder: Path, training_job: Job) -> None:
    folders = [training_job(qwen2_folder, name, device="cpu") for name in ("one", "two")]
    for folder in folders:
        run_engine(folder)
    assert_same_bits(*folders)
