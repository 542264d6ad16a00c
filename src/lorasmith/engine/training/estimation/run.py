"""A job that says what a training run would take. The model is never loaded; a few random layers of its shape are measured."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from lorasmith.engine.data.examples import read_examples
from lorasmith.engine.data.labels import stop_ids
from lorasmith.engine.data.templates import choose_template
from lorasmith.engine.lora.targets import left_out_note
from lorasmith.engine.models.device import choose_device, device_name
from lorasmith.engine.models.loading import load_tokenizer, model_folder
from lorasmith.engine.models.precision import choose_memory, choose_precision
from lorasmith.engine.models.workspace import trim_heap
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.devices import Devices, launch
from lorasmith.engine.training.estimation.memory import Process, resident_bytes
from lorasmith.engine.training.estimation.prediction import (
    Overheads,
    Prediction,
    predict,
    process_seconds,
    quantising_seconds,
    read_seconds,
)
from lorasmith.engine.training.estimation.sample import Sample, TooLargeToMeasure, choose_sample
from lorasmith.engine.training.estimation.several import alone_share, exchange_seconds, reduce_seconds
from lorasmith.engine.training.estimation.shape import Material, RunShape, shape_run
from lorasmith.engine.training.estimation.skeleton import read_config
from lorasmith.engine.training.estimation.suggestions import Candidate, candidates, suggest
from lorasmith.engine.training.estimation.timing import Rates, compile_parts, expected_growth, measure, small_model
from lorasmith.engine.training.run import peak_bytes
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.estimation import Estimate, EstimateInputs, Suggestion, seed_training_vram_gb
from lorasmith.schemas.jobs import JobOrder
from lorasmith.schemas.training import TrainingSpec


@dataclass(frozen=True)
class Findings:
    """All that the run is predicted from. `rates` are None where not even a few layers could be measured."""

    shape: RunShape
    tried: list[Candidate]
    process: Process
    overheads: Overheads
    rates: Rates | None
    why_no_time: str | None


def run(order: JobOrder, folder: Path, report: Reporter) -> Estimate:
    spec = TrainingSpec.model_validate(order.spec)
    check_device(spec)
    inputs = EstimateInputs.model_validate(order.inputs)
    threads, began = torch.get_num_threads(), time.perf_counter()
    with launch(spec.training.processes, folder) as devices:
        launch_s = time.perf_counter() - began
        found = run_on(order, folder, report, devices, threads_alone=threads)
    overheads = replace(found.overheads, launch_s=launch_s)

    def predicted(one: RunShape) -> Prediction:
        return predict(one, found.process, overheads, found.rates, found.shape, Path(inputs.disk_folder))

    prediction = predicted(found.shape)
    suggestions = suggest(found.tried, found.shape, prediction, predicted)
    return told(found.shape, inputs, prediction, suggestions, found.why_no_time)


def run_on(order: JobOrder, folder: Path, report: Reporter, devices: Devices, threads_alone: int = 1) -> Findings:
    """One process's part of what is measured; only the first one returns. `threads_alone`: of a run of one process."""
    spec = TrainingSpec.model_validate(order.spec)
    inputs = EstimateInputs.model_validate(order.inputs)
    report("phase", name="tokenize")
    material = read_material(spec, inputs)
    material.rows(spec, spec.training.too_long)
    started_s = process_seconds()
    touch_libraries(material, spec)
    # now, as a model without weights, which follows, loads more than a run does
    resident = resident_bytes()
    trim_heap()
    freed = resident - resident_bytes()
    idle = Process(resident, 0, freed, further_bytes=max(devices.gather(resident)[1:], default=0))
    drawing_s = 0.0
    if devices.first:
        before = resident_bytes()
        drawing_s = drawing_seconds(folder)
        idle = replace(idle, drawing_bytes=resident_bytes() - before)

    report("phase", name="rehearse")
    shape = shape_run(material, spec, devices=devices)
    if devices.first and (note := left_out_note(shape.base, spec.lora.target_modules)):
        report("note", text=note)
    loading_s = read_seconds(material.folder, shape.stored.file_bytes) + quantising_seconds(shape)
    tried = candidates(material, shape, idle) if devices.first else []
    report("phase", name="measure")
    try:
        sample = devices.found_by_first(lambda: choose_sample(shape, inputs.measuring_s))
    except TooLargeToMeasure as reason:  # in the first process; the others wait until they are ended
        return Findings(shape, tried, idle, Overheads(started_s + loading_s, drawing_s), None, str(reason))
    rates, libraries_bytes = measured(
        material, shape, sample, folder, inputs.measuring_s, report, devices, threads_alone
    )
    devices.leave()
    process = replace(idle, libraries_bytes=libraries_bytes)
    return Findings(shape, tried, process, Overheads(started_s + loading_s, drawing_s), rates, None)


def check_device(spec: TrainingSpec) -> None:
    """Raise `InvalidSpec` for a run that would take a GPU: what is rehearsed and measured here is a CPU."""
    device = choose_device(spec.training.device, processes=spec.training.processes)
    if device != "cpu":
        raise InvalidSpec(
            f"this run would be computed on {device_name(device)}, and only runs on a CPU are estimated",
            hint="--set training.device=cpu says what it would take on the CPU",
        )


def read_material(spec: TrainingSpec, inputs: EstimateInputs) -> Material:
    """Config, tokenizer and rows; weights are not fetched."""
    folder = model_folder(inputs.model_folder, weights=False)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    examples = read_examples(Path(inputs.train_file))
    if spec.template is not None or any(example.messages is not None for example in examples):
        choose_template(tokenizer, spec.template)
    return Material(
        config=config,
        folder=folder,
        tokenizer=tokenizer,
        stop_ids=stop_ids(folder, config, tokenizer),
        train=examples,
        validation=read_examples(Path(inputs.val_file)) if inputs.val_file else [],
    )


def touch_libraries(material: Material, spec: TrainingSpec) -> None:
    """Load what a run loads before it computes: the modules of the model, and the kernels that it is compared by."""
    AutoModelForCausalLM._model_mapping[type(material.config)]
    precision = choose_precision(spec.training.precision)
    choose_memory(spec.training.memory_wanted, precision, 0)


def drawing_seconds(folder: Path) -> float:
    """Draw as a run draws its losses at its end."""
    began = time.perf_counter()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label="training")
    axes.legend()
    figure.savefig(folder / "loss.png")
    return time.perf_counter() - began


def measured(
    material: Material,
    shape: RunShape,
    sample: Sample,
    folder: Path,
    budget_s: float,
    report: Reporter,
    devices: Devices,
    threads_alone: int,
) -> tuple[Rates, int]:
    """Rates, and the bytes that libraries take when they compute."""
    small = small_model(shape, sample, material.tokenizer, folder, report, devices)
    own = [batch for of_each in sample.batches if (batch := of_each[devices.rank])]
    expected = expected_growth(shape, small, own)
    compiler_bytes, compiler_s = compile_parts(shape, small)
    before = resident_bytes()
    rates = measure(shape, small, sample, devices, folder, budget_s, report)
    rates = replace(rates, first_s=rates.first_s + compiler_s)
    libraries_bytes = max(devices.gather(compiler_bytes + max(0, peak_bytes() - before - expected)))
    if devices.count == 1:
        return rates, libraries_bytes
    began = time.perf_counter()
    of_several = replace(
        rates,
        exchange_s=exchange_seconds(devices),
        reduce_s=reduce_seconds(shape, devices),
        alone=alone_share(small.all, sample, small.rows, devices, threads_alone),
    )
    return replace(of_several, measured_s=rates.measured_s + time.perf_counter() - began), libraries_bytes


def told(
    shape: RunShape,
    inputs: EstimateInputs,
    prediction: Prediction,
    suggestions: list[Suggestion],
    why_no_time: str | None,
) -> Estimate:
    settings = shape.spec.training
    longest = max(len(row.ids) for row in shape.part.rows)
    why_not, way_out = verdict(shape, prediction, suggestions)
    return Estimate(
        model=inputs.model_name,
        dataset=inputs.dataset_name,
        parameters=shape.parameters,
        trainable_parameters=shape.trained_elements,
        rows=len(shape.part.rows),
        tokens=shape.part.tokens,
        longest_row_tokens=longest,
        steps=shape.plan.total_steps,
        processes=shape.processes,
        precision="fp32" if shape.precision == "int16" and shape.decoder is None else shape.precision,
        memory_mode=shape.memory,
        compiled=shape.compiled,
        computed_by="packed decoder" if shape.decoder is not None else "PEFT",
        why_peft=shape.why_peft,
        fits=prediction.fits,
        why_not=why_not,
        way_out=way_out,
        memory=prediction.memory,
        time=prediction.time,
        why_no_time=why_no_time,
        disk=prediction.disk,
        suggestions=suggestions,
        seed_formula_bytes=round(
            1e9
            * seed_training_vram_gb(
                shape.parameters / 1e9, weight_bits(shape), shape.lora.r, settings.batch_size, longest
            )
        ),
    )


def weight_bits(shape: RunShape) -> int:
    """Of a weight of the base's layers, as the formula counts them."""
    if shape.quantization is None:
        return 8 * shape.dtype.itemsize
    return {"stored": 16, "int8": 8}.get(shape.quantization.kind, 4)


def verdict(shape: RunShape, prediction: Prediction, suggestions: list[Suggestion]) -> tuple[str | None, str | None]:
    """Why the run does not fit, and the way out."""
    memory, disk = prediction.memory, prediction.disk
    if prediction.fits:
        return None, None
    if disk.peak_bytes > disk.free_bytes:
        return (
            f"it writes up to {disk.peak_bytes / 1e9:.1f} GB, and the disk has {disk.free_bytes / 1e9:.1f} GB free",
            "free some space, choose another --home, or --set training.keep_checkpoints=1",
        )
    several = f" in {shape.processes} processes" if shape.processes > 1 else ""
    reason = (
        f"it needs {memory.peak_bytes / 1e9:.1f} GB{several}, and {memory.available_bytes / 1e9:.1f} GB are available"
    )
    each = " in each" if several else ""
    fitting = next((one for one in suggestions if one.fits), None)
    if fitting:
        return reason, " ".join(f"--set {assignment}" for assignment in fitting.assignments)
    least = min([memory.peak_bytes, *(one.peak_memory_bytes for one in suggestions)])
    return (
        f"{reason}; its weights alone take {memory.weights_bytes / 1e9:.1f} GB in {weight_bits(shape)} bits{each}",
        f"a smaller model, or a machine with {least / 1e9:.0f} GB of free memory for what takes least below",
    )
