"""The parts of an estimate against closed forms, files on disk and what a real step does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.data.tokenizing import tokenized
from lorasmith.engine.lora.dropout import RowDropout
from lorasmith.engine.lora.quantized import AS_STORED, Quantization, quantize
from lorasmith.engine.lora.quantized_linear import quantized_bytes, quantized_elements
from lorasmith.engine.models.families import pack_weights, read_decoder
from lorasmith.engine.models.loading import load_model
from lorasmith.engine.reporting import Reporter, SilentReporter
from lorasmith.engine.training.computation import PackedComputation
from lorasmith.engine.training.estimation.memory import (
    Process,
    adapter_bytes,
    estimate_disk,
    estimate_memory,
    go_through,
    optimizer_bytes,
    prepared,
    save_steps,
)
from lorasmith.engine.training.estimation.micro_batches import records
from lorasmith.engine.training.estimation.prediction import Overheads, Prediction, predict
from lorasmith.engine.training.estimation.random_model import tiled
from lorasmith.engine.training.estimation.rehearsal import Unperformed, heap_growth
from lorasmith.engine.training.estimation.shape import Material, RunShape, shape_run
from lorasmith.engine.training.estimation.skeleton import read_config
from lorasmith.engine.training.estimation.suggestions import Change, candidates, changes, fewest, suggest
from lorasmith.engine.training.estimation.untouched import UntouchedDropout, untouched_weight
from lorasmith.engine.training.optimizers import build_optimizer
from lorasmith.engine.training.run import adapted
from lorasmith.errors import InvalidModel, JobFailed
from lorasmith.schemas.estimation import seed_training_vram_gb
from lorasmith.schemas.training import TrainingSpec
from tests.engine.conftest import Shaped
from tests.engine.small_jobs import run_engine, tie_ends


def adapter_and_weights(shape: RunShape) -> int:
    memory = estimate_memory(shape, Process(0, 0))
    return memory.weights_bytes + memory.packed_bytes + memory.adapter_bytes


def test_weights_and_trained_elements_are_those_of_the_loaded_model(shaped: Shaped, qwen2_folder: Path) -> None:
    shape = shaped()
    model, _ = adapted(load_model(qwen2_folder), shape.lora, qwen2_folder, SilentReporter(qwen2_folder))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    assert shape.trained_elements == sum(count for count, trains in sizes if trains)
    assert shape.weight_bytes == 4 * sum(count for count, trains in sizes if not trains)
    assert shape.stored.file_bytes == shape.weight_bytes  # fp32 on disk, head and embedding apart


def test_mapped_weights_are_counted_once_and_what_is_joined_twice(shaped: Shaped, qwen2_folder: Path) -> None:
    shape = shaped()
    shape.step_bytes = 0
    layer = (64 + 32 + 32) * 64 + 2 * 128 * 64  # q, k, v and gate, up are joined
    assert estimate_memory(shape, Process(0, 0)).weights_bytes == shape.weight_bytes + 4 * 2 * layer


def test_what_is_given_back_before_the_first_step_and_what_draws_after_the_last_are_counted_once(
    shaped: Shaped,
) -> None:
    shape = shaped()
    shape.step_bytes, mega = 0, 10**6

    def peak(**measured: int) -> int:
        return estimate_memory(shape, Process(500 * mega, 0, **measured)).peak_bytes

    held = peak() - 500 * mega
    assert peak(freed_bytes=mega // 10) == peak() - mega // 10
    assert peak(drawing_bytes=100 * mega, freed_bytes=mega) == 500 * mega + adapter_and_weights(shape) + 99 * mega
    shape.step_bytes = 200 * mega
    assert peak(drawing_bytes=100 * mega) == 700 * mega + held  # a step's buffers are free by then


def test_packing_is_counted_as_the_packed_model_has_it(shaped: Shaped, qwen2_folder: Path) -> None:
    shape = shaped()
    shape.step_bytes, shape.memory = 0, "fast"
    model, _ = adapted(load_model(qwen2_folder), shape.lora, qwen2_folder, SilentReporter(qwen2_folder))
    decoder = read_decoder(model)
    pack_weights(decoder, model)
    matrices = [*(group.weight for group in decoder.groups), decoder.head]
    elements = sum(part.numel() for matrix in matrices for part in (matrix.towards, matrix.back))  # type: ignore[attr-defined]
    assert estimate_memory(shape, Process(0, 0)).packed_bytes == 4 * elements


@pytest.mark.parametrize(("name", "double"), [("nf4", True), ("fp4", False), ("int8", True)])
def test_a_quantised_base_is_as_large_as_the_loaded_one(
    shaped: Shaped, qwen2_folder: Path, name: Any, double: bool
) -> None:
    shape = shaped(quantization=name, double_quantization=double)
    model, _ = adapted(
        load_model(qwen2_folder, quantization=shape.quantization),
        shape.lora,
        qwen2_folder,
        SilentReporter(qwen2_folder),
    )
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert shape.memory == "lean"
    assert shape.weight_bytes == sum(parameter.nbytes for parameter in frozen) + quantized_bytes(model)
    assert shape.parameters == sum(parameter.numel() for parameter in frozen) + quantized_elements(model)
    shape.step_bytes = 0
    memory = estimate_memory(shape, Process(0, 0))
    assert memory.weights_bytes == shape.weight_bytes  # nothing is mapped or joined
    embedding = 4 * 64 * shape.base.config.vocab_size  # is mapped while it is read, the largest tensor of the file
    assert memory.loading_bytes == shape.weight_bytes + embedding


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_in_the_16_bits_of_its_file_is_as_large_as_the_loaded_one(
    material: Callable[..., tuple[TrainingSpec, Material]], bf16_folder: Path, tmp_path: Path, tied: bool
) -> None:
    folder = tie_ends(bf16_folder, tmp_path / "tied") if tied else bf16_folder
    spec, found = material(folder, memory="lean")
    shape = shape_run(found, spec)
    model = load_model(folder, quantization=AS_STORED)
    assert shape.quantization == AS_STORED
    assert shape.weight_bytes == sum(parameter.nbytes for parameter in model.parameters()) + quantized_bytes(model)
    converted = shape_run(
        found, spec.model_copy(update={"training": spec.training.model_copy(update={"memory": "auto"})})
    )
    assert converted.quantization is None
    assert shape.parameters == converted.parameters
    assert {"training.memory": "lean"} in [change.values for change in changes(converted)]
    assert shape_run(replace(found, folder=tmp_path), spec).weight_bytes == shape.weight_bytes  # from the config alone


@pytest.mark.parametrize(
    "quantization", [Quantization("nf4"), Quantization("fp4", double=False), Quantization("int8"), AS_STORED]
)
@pytest.mark.parametrize("size", [(7, 13), (64, 96), (300, 4096)])
def test_quantised_weights_that_were_never_read_have_the_size_of_real_ones(
    quantization: Quantization, size: tuple[int, int]
) -> None:
    dtype = torch.bfloat16 if quantization == AS_STORED else torch.float32
    real = quantize(torch.randn(size, dtype=dtype), quantization)
    assert untouched_weight(size, quantization).nbytes == real.nbytes
    tile = quantize(torch.randn(1, 4096, dtype=dtype), replace(quantization, double=False))
    noise = tiled(tile, size, double=quantization.double)
    assert (noise.nbytes, noise.shape, noise.kind) == (real.nbytes, real.shape, real.kind)
    assert noise.dequantize(torch.empty(size)).std().item() == pytest.approx(1, abs=0.4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_optimizer_state_is_as_large_as_the_real_one(name: Any) -> None:
    if name == "lion":
        pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.zeros(48, 20))
    weight.grad = torch.ones_like(weight)
    optimizer = build_optimizer(name, {"w": weight}, rate=1e-3, weight_decay=0.0)
    optimizer.step()
    real = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor) and value.ndim]
    assert optimizer_bytes(name, (48, 20)) == sum(value.nbytes for value in real)


def test_an_8bit_state_is_a_quarter_and_its_scales() -> None:
    assert optimizer_bytes("adamw_8bit", (64, 256)) == 2 * (64 * 256 + 4 * 64)
    assert optimizer_bytes("adamw_8bit", (8, 8)) == optimizer_bytes("adamw", (8, 8))  # too small to be worth it


def test_a_checkpoint_and_the_disk_are_as_large_as_measured(
    training_job: Callable[..., Path], shaped: Shaped, qwen2_folder: Path
) -> None:
    shape = shaped(num_epochs=1, save_every=2)
    job = training_job(qwen2_folder, "real", num_epochs=1, save_every=2)
    run_engine(job)
    disk = estimate_disk(shape, job)
    folders = list((job / "checkpoints").iterdir())
    assert len(folders) == disk.checkpoints == 3
    weights = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in folders]
    assert weights[0] == pytest.approx(disk.checkpoint_bytes, rel=0.35)  # headers: 14 tensors of 256 numbers
    assert 0 < weights[0] - disk.checkpoint_bytes < 40_000
    assert save_steps(shape) == [2, 4, 6]


def test_the_token_store_is_as_large_as_the_one_that_a_run_makes(
    material: Callable[..., tuple[TrainingSpec, Material]], tmp_path: Path
) -> None:
    spec, found = material(max_seq_length=34, too_long="right")
    disk = estimate_disk(shape_run(found, spec), tmp_path)
    for part in ("train", "val"):
        tokenized(tmp_path / f"{part}.jsonl", tmp_path / "tokens", found.tokenizer, found.stop_ids, Reporter(tmp_path))
    written = sum(path.stat().st_size for path in (tmp_path / "tokens").glob("*/*.bin"))
    assert disk.token_store_bytes == written
    assert disk.peak_bytes > disk.token_store_bytes + disk.checkpoint_bytes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True},
        {"memory": "fast"},
        {"quantization": "nf4"},
        {"quantization": "int8"},
        "half",
    ],
    ids=str,
)
def test_a_rehearsed_step_has_the_workspace_of_the_real_one(
    material: Callable[..., tuple[TrainingSpec, Material]], qwen2_folder: Path, bf16_folder: Path, settings: Any
) -> None:
    folder = bf16_folder if settings == "half" else qwen2_folder
    spec, found_material = material(folder, **({} if settings == "half" else settings))
    shape = shape_run(found_material, spec)
    assert (shape.quantization == AS_STORED) == (settings == "half")
    model, _ = adapted(load_model(folder, quantization=shape.quantization), shape.lora, folder, SilentReporter(folder))
    decoder = read_decoder(model)
    if shape.memory == "fast":
        pack_weights(decoder, model)
    training = shape.spec.training
    real = PackedComputation(
        decoder,
        seed=0,
        micro_batch_tokens=training.micro_batch_tokens,
        recompute=training.gradient_checkpointing,
        lean=shape.is_lean,
    )
    unreal = prepared(shape, layers=2)
    assert isinstance(unreal, PackedComputation)
    batch = real.micro_batches(range(12), shape.part.rows)[0]
    real.gradients(batch, shape.part.rows, scale=1.0, step=0)
    with Unperformed():
        unreal.gradients(batch, shape.part.rows, scale=1.0, step=0)
    found = {name: buffer.shape for name, buffer in unreal.decoder.workspace.buffers.items()}
    assert found == {name: buffer.shape for name, buffer in real.decoder.workspace.buffers.items()}


def test_a_run_through_peft_is_rehearsed_too(shaped: Shaped) -> None:
    shape = shaped()
    through_peft = replace(shape, decoder=None, why_peft="asked for", step_bytes=None)
    with Unperformed():
        go_through(through_peft, prepared(through_peft, layers=2))  # through transformers, PEFT and autograd
    assert estimate_memory(through_peft, Process(0, 0)).weights_bytes == shape.weight_bytes  # nothing is joined
    quantized = replace(shaped(quantization="nf4"), decoder=None, why_peft="asked for")
    with Unperformed():
        go_through(quantized, prepared(quantized, layers=2))


THREE_AT_ONCE = """
import ctypes
import torch
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
mallinfo2 = ctypes.CDLL("libc.so.6").mallinfo2
mallinfo2.restype = Heap
from lorasmith.engine.training.estimation.rehearsal import heap_growth
def prepare():
    def go():
        print(mallinfo2().fordblks, flush=True)
        a = torch.ones({side})
        b = a * 2
        del a
        (b[: -(1 << 20)] + 1).exp()  # small enough for the hole of `a`, wherever that begins
    return go
print(heap_growth(prepare, retained=True))
"""


def test_growth_is_what_is_alive_at_a_time_and_nothing_is_touched() -> None:
    side = 16 << 20  # 64 MB in fp32
    fresh = [sys.executable, "-c", THREE_AT_ONCE.format(side=side)]  # the heap of this process has large holes to fill
    printed = subprocess.run(fresh, check=True, capture_output=True, text=True).stdout
    free, grown = map(int, printed.split())
    assert free < 4 * side  # no tensor fits into what the heap has free already, but one may begin there
    alive = 2 * 4 * side + 4 * (side - (1 << 20))  # three of the four are alive at a time
    assert alive - free <= grown <= alive + (8 << 20)


def test_masks_of_a_rehearsal_are_as_large_as_drawn_ones_and_not_drawn() -> None:
    drawn = RowDropout(0, 0, [0, 1], [3000, 5000]).dropped(64, 0.1)
    mask = UntouchedDropout([3000, 5000]).dropped(64, 0.1)
    assert mask.dtype == drawn.dtype
    assert len(mask) == pytest.approx(len(drawn), rel=0.02)  # 51,200 of 512,000, standard deviation 0.4 %
    resident = psutil.Process().memory_info().rss
    huge = UntouchedDropout([4096]).dropped(1 << 17, 0.5)  # 2.1 GB, four at a time
    assert huge.nbytes > 2e9
    assert psutil.Process().memory_info().rss - resident < 50e6


def test_products_with_experts_are_rehearsed_in_fp32() -> None:
    with Unperformed():
        product = torch._grouped_mm(torch.zeros(8, 16), torch.zeros(2, 16, 32), offs=torch.tensor([3, 8]).int())
    assert (product.shape, product.dtype) == ((8, 32), torch.float32)


def test_what_fails_in_a_rehearsal_is_said() -> None:
    def fails() -> Callable[[], None]:
        raise ValueError("no such layer")

    with pytest.raises(JobFailed, match="could not be rehearsed: ValueError: no such layer"):
        heap_growth(fails, retained=False)


def test_records_are_the_growing_batches_and_the_largest() -> None:
    rows = [RenderedExample(n, [1] * n, [True] * n) for n in (100, 105, 300, 120, 310)]
    assert records(iter([[0], [1], [2], [3], [4]]), rows) == [[0], [2], [4]]  # 105 is no growth, 310 is the largest


def test_a_smaller_adapter_and_a_shorter_limit_are_predicted_not_told(
    material: Callable[..., tuple[TrainingSpec, Material]],
) -> None:
    spec, found = material()
    shape = shape_run(found, spec)
    longest = max(len(row.ids) for row in shape.part.rows)
    by_name = {change.assignments[0].partition("=")[0]: change for change in changes(shape)}
    assert "training.num_epochs" in by_name
    shorter = shape_run(
        found,
        spec.model_copy(update={"training": spec.training.model_copy(update={"max_seq_length": longest - 1})}),
        like=shape,
    )
    assert len(shorter.part.rows) < len(shape.part.rows)
    smaller = shape_run(found, spec.model_copy(update={"lora": spec.lora.model_copy(update={"rank": 2})}), like=shape)
    assert adapter_bytes(smaller) * 2 == adapter_bytes(shape)


def test_the_formula_of_the_design_gives_what_its_text_computes() -> None:
    # 7 B, 4 bits, rank 32, one row of 512: 3.5 + 5 · 2·32·2645·28·4/1e9 + 512·2645·28·2/1e9, and a tenth
    assert seed_training_vram_gb(7, 4, 32, 1, 512) == pytest.approx(1.1 * (3.5 + 5 * 0.01895936 + 0.0758374), rel=1e-4)


def test_an_unknown_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-family"}')
    with pytest.raises(InvalidModel, match="describes no model that transformers knows"):
        read_config(tmp_path)


@pytest.mark.parametrize(("needed", "left"), [("ab", "ab"), ("d", "d"), ("bd", "bd"), ("abcd", "abcd"), ("e", "abcd")])
def test_as_few_changes_are_told_as_it_takes(needed: str, left: str) -> None:
    found = [Change({name: 1}, "") for name in "abcd"]

    def fits(several: list[Change]) -> bool:
        return set(needed) <= {name for change in several for name in change.values}

    assert [change.values for change in fewest(found, fits)] == [{name: 1} for name in left]
    assert fewest([], fits) == []


def test_a_run_that_nothing_makes_fit_is_told_what_takes_least_first(
    material: Callable[..., tuple[TrainingSpec, Material]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, found = material()
    idle = Process(0, 0)
    shape = shape_run(found, spec)

    def predicted(one: RunShape) -> Prediction:
        return predict(one, idle, Overheads(0, 0), None, shape, tmp_path)

    ample = suggest(candidates(found, shape, idle), shape, predicted(shape), predicted)
    wanted = [change.assignments for change in changes(shape)]
    assert [one.assignments for one in ample] == [one for one in wanted if one in [s.assignments for s in ample]]
    monkeypatch.setattr("lorasmith.engine.training.estimation.memory.available_bytes", lambda: 0)
    monkeypatch.setattr("lorasmith.engine.training.estimation.memory.resident_bytes", lambda: 0)
    told = suggest(candidates(found, shape, idle), shape, predicted(shape), predicted)
    assert not any(one.fits for one in told)
    peaks = [one.peak_memory_bytes for one in told]
    assert peaks == sorted(peaks)
    together = next(one for one in told if len(one.assignments) > 1)
    assert "training.precision=bf16" in together.assignments
