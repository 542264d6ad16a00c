"""A job that says what a training run would take. The model is never loaded; a few random layers of its shape are measured."""

from __future__ import annotations

import resource
import time
from pathlib import Path

from transformers import AutoModelForCausalLM

from lorasmith.engine.data.examples import read_examples
from lorasmith.engine.data.labels import stop_ids
from lorasmith.engine.data.templates import choose_template
from lorasmith.engine.models.device import choose_device, device_name
from lorasmith.engine.models.loading import load_tokenizer, model_folder
from lorasmith.engine.models.precision import DTYPES, choose_memory, choose_precision
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.estimation.memory import Process, resident_bytes
from lorasmith.engine.training.estimation.prediction import (
    Overheads,
    Prediction,
    predict,
    process_seconds,
    quantising_seconds,
    read_seconds,
)
from lorasmith.engine.training.estimation.shape import Material, RunShape, shape_run
from lorasmith.engine.training.estimation.skeleton import read_config
from lorasmith.engine.training.estimation.suggestions import candidates, suggest
from lorasmith.engine.training.estimation.timing import (
    Rates,
    TooLargeToMeasure,
    expected_growth,
    measure,
    measured_batches,
    small_model,
)
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.estimation import Estimate, EstimateInputs, Suggestion, seed_training_vram_gb
from lorasmith.schemas.jobs import JobOrder
from lorasmith.schemas.training import TrainingSpec


def run(order: JobOrder, folder: Path, report: Reporter) -> Estimate:
    spec = TrainingSpec.model_validate(order.spec)
    check_device(spec)
    inputs = EstimateInputs.model_validate(order.inputs)
    report("phase", name="tokenize")
    material = read_material(spec, inputs)
    material.rows(spec, spec.training.too_long)
    started_s = process_seconds()
    touch_libraries(material, spec)
    drawing_s = drawing_seconds(folder)
    idle = Process(
        resident_bytes(), libraries_bytes=0
    )  # a model without weights, which follows, loads more than a run does

    report("phase", name="rehearse")
    shape = shape_run(material, spec)
    loading_s = read_seconds(material.folder, shape.stored.file_bytes) + quantising_seconds(shape)
    overheads = Overheads(started_s + loading_s, drawing_s)
    disk_folder = Path(inputs.disk_folder)
    tried = candidates(material, shape, idle)
    report("phase", name="measure")
    rates, libraries_bytes, why_no_time = measured(material, shape, folder, inputs.measuring_s, report)
    process = Process(idle.resident_bytes, libraries_bytes)

    def predicted(one: RunShape) -> Prediction:
        return predict(one, process, overheads, rates, shape, disk_folder)

    prediction = predicted(shape)
    return told(shape, inputs, prediction, suggest(tried, shape, prediction, predicted), why_no_time)


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
    choose_memory(spec.training.memory_wanted, DTYPES[precision], 0)


def drawing_seconds(folder: Path) -> float:
    """Draw as a run draws its losses at its end: that is part of its time, and its libraries of its peak."""
    began = time.perf_counter()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label="training")
    axes.legend()
    figure.savefig(folder / "loss.png")
    return time.perf_counter() - began


def measured(
    material: Material, shape: RunShape, folder: Path, budget_s: float, report: Reporter
) -> tuple[Rates | None, int, str | None]:
    """Rates, the bytes that libraries take when they compute, and why there are none of both."""
    try:
        batches = measured_batches(shape, budget_s)
        small = small_model(shape, material.tokenizer, folder, report)
        expected = expected_growth(shape, small, batches)
        before = resident_bytes()
        rates = measure(shape, small, batches, folder, budget_s, report)
    except TooLargeToMeasure as reason:
        return None, 0, str(reason)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return rates, max(0, peak - before - expected), None


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
        precision=shape.precision,
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
    reason = f"it needs {memory.peak_bytes / 1e9:.1f} GB, and {memory.available_bytes / 1e9:.1f} GB are available"
    fitting = next((one for one in suggestions if one.fits), None)
    if fitting:
        return reason, " ".join(f"--set {assignment}" for assignment in fitting.assignments)
    least = min([memory.peak_bytes, *(one.peak_memory_bytes for one in suggestions)])
    return (
        f"{reason}; its weights alone take {memory.weights_bytes / 1e9:.1f} GB in {weight_bits(shape)} bits",
        f"a smaller model, or a machine with {least / 1e9:.0f} GB of free memory for what takes least below",
    )
