"""A training job: dataset and base model in, a PEFT folder and its measurements out."""

from __future__ import annotations

import resource
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model

from lorasmith.engine.data.examples import has_conversations
from lorasmith.engine.data.parts import RenderedPart, stored_part
from lorasmith.engine.data.templates import choose_template
from lorasmith.engine.lora.config import LoRAConfig, fit
from lorasmith.engine.lora.quantized import AS_STORED, Quantization
from lorasmith.engine.lora.quantized_linear import quantized_bytes, quantized_elements
from lorasmith.engine.lora.targets import left_out_note
from lorasmith.engine.models.device import Device, device_name, gpu_peak_bytes
from lorasmith.engine.models.loading import (
    base_fingerprint,
    context_tokens,
    eos_token_ids,
    load_model,
    load_tokenizer,
    model_folder,
)
from lorasmith.engine.models.precision import DTYPES, Precision
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.artifacts import write_adapter
from lorasmith.engine.training.batches import plan_steps
from lorasmith.engine.training.checkpoints import (
    Progress,
    forget_damaged_best,
    load_best,
    load_checkpoint,
    newest_checkpoint,
    trainable,
)
from lorasmith.engine.training.choices import (
    PREFIX,
    Choices,
    choose_base,
    choose_computation,
    choose_training_device,
    choose_training_precision,
)
from lorasmith.engine.training.devices import Devices, launch
from lorasmith.engine.training.guards import check_end, check_result
from lorasmith.engine.training.initial import moves_weight, start
from lorasmith.engine.training.loop import TrainingRun, heed_kill, train
from lorasmith.engine.training.optimizers import build_optimizer
from lorasmith.engine.training.schedule import best_evaluation
from lorasmith.errors import InvalidSpec
from lorasmith.faults import fault_point
from lorasmith.files import sha256_file
from lorasmith.schemas.data import TooLong
from lorasmith.schemas.jobs import JobOrder
from lorasmith.schemas.training import TrainingInputs, TrainingResult, TrainingSpec

TOKENS = "tokens"  # in the job folder, where the order names no other place


def run(order: JobOrder, folder: Path, report: Reporter) -> TrainingResult:
    """Train, or go on from the newest whole checkpoint of the folder. Raises `Interrupted` when asked to stop."""
    spec = TrainingSpec.model_validate(order.spec)
    if spec.training.processes > 1:
        report("note", text=f"starts {spec.training.processes} processes, which share each step")
    with launch(spec.training.processes, folder) as devices:
        return run_on(order, folder, report, devices)


def run_on(order: JobOrder, folder: Path, report: Reporter, devices: Devices) -> TrainingResult:
    """One process's part of `run`; only the first one returns."""
    spec = TrainingSpec.model_validate(order.spec)
    inputs = TrainingInputs.model_validate(order.inputs)
    choices = Choices(folder, report, devices)
    device = choose_training_device(choices, spec.training)
    precision = choose_training_precision(choices, spec.training, device)
    if device == "cuda":
        report_gpu(report, spec, precision)

    report("phase", name="load")
    base_folder = model_folder(inputs.model_folder)
    tokenizer = load_tokenizer(base_folder)
    quantization = choose_base(choices, spec, precision, base_folder, device)
    base = load_model(base_folder, DTYPES[precision], quantization, torch.device(device))
    if quantized := quantized_elements(base):
        report("note", text=held_note(base, quantized, precision, quantization))
    stop_ids = eos_token_ids(base, tokenizer)

    report("phase", name="tokenize")
    if spec.template is not None or has_conversations(Path(inputs.train_file)):
        choose_template(tokenizer, spec.template)
    tokens_folder = Path(inputs.tokens_folder) if inputs.tokens_folder else folder / TOKENS
    context = context_tokens(base)
    max_tokens = min(spec.training.max_seq_length, context or spec.training.max_seq_length)

    def rows_of(examples_file: str, too_long: TooLong, *, may_be_empty: bool = False) -> RenderedPart:
        return stored_part(
            Path(examples_file),
            tokens_folder,
            tokenizer,
            stop_ids,
            report,
            max_tokens=max_tokens,
            too_long=too_long,
            allow=spec.training.allow,
            may_be_empty=may_be_empty,
        )

    part = rows_of(inputs.train_file, spec.training.too_long)
    validation = None
    if inputs.val_file:
        validation = rows_of(inputs.val_file, "drop", may_be_empty=True)  # left out of the loss, and counted
    report_rows(report, part, validation)
    if spec.training.needs_validation and not (validation and validation.rows):
        raise InvalidSpec(
            f"{spec.training.needs_validation} needs validation rows, and dataset {inputs.dataset_name!r} has none that fit",
            hint="split it again with a validation part, or raise training.max_seq_length",
        )

    torch.manual_seed(spec.training.seed)
    if note := left_out_note(base, spec.lora.target_modules):
        report("note", text=note)
    lora = fit(LoRAConfig(r=spec.lora.rank, **spec.lora.model_dump(exclude={"rank"})), base)
    with devices.first_before_others():
        model, initial = adapted(base, lora, folder, report)
    if initial and precision == "bf16" and not quantized:
        report("note", text=f"init {lora.init} in bf16: the base is rounded once more while training; fp32 is exact")
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    counts.append((quantized, False))
    training = TrainingRun(
        job=folder,
        model=model,
        optimizer=build_optimizer(
            spec.training.optimizer,
            trainable(model),
            rate=spec.training.learning_rate,
            weight_decay=spec.training.weight_decay,
            lora_plus_ratio=spec.training.lora_plus_ratio,
        ),
        initial=initial,
        computation=choose_computation(choices, model, tokenizer, spec.training, precision, part.rows, report),
        choices=choices,
        plan=plan_steps(
            len(part.rows),
            batch_size=spec.training.batch_size,
            accumulation=spec.training.gradient_accumulation_steps,
            epochs=spec.training.num_epochs,
            max_steps=spec.training.max_steps,
            seed=spec.training.seed,
        ),
        settings=spec.training,
        train=part.rows,
        validation=validation.rows if validation else [],
        progress=Progress(),
        devices=devices,
    )
    with devices.first_before_others():
        checkpoint = newest_checkpoint(folder, report)
    materials = {"base": base_folder, "training rows": Path(inputs.train_file)}
    if inputs.val_file:
        materials["validation rows"] = Path(inputs.val_file)
    choices.keep_materials(materials, digest_of_material, resumed=checkpoint is not None)
    if checkpoint is not None:
        training.progress = load_checkpoint(checkpoint, model, training.optimizer)
        if spec.training.keep_best:
            forget_damaged_best(folder, training.progress, report)
        fault_point("train.resumed")
        report("resumed", step=training.progress.step, checkpoint=checkpoint.name)

    heed_kill(training, report)
    report("phase", name="train")
    fault_point("train.started")
    finished = train(training, report)
    peaks = devices.gather(peak_bytes())
    devices.leave()
    fault_point("train.finished")
    if not finished:
        raise report.stop(
            f"stopped after step {training.progress.step} of {training.plan.total_steps}; everything is saved",
            hint=f"lorasmith train --resume {order.id}",
        )
    result = measured(training, part, counts, precision, device, sum(peaks[1:]))
    check_end(result.adapter_step, result.validation_loss, training.progress.left_out)
    if result.stopped_early:
        patience = spec.training.early_stopping_patience
        report(
            "note",
            text=f"stopped early after step {result.total_steps} of {result.planned_steps}: no better validation loss "
            f"in {patience} evaluation{'s' * (patience != 1)}, the best is {result.best_validation_loss:.4f}",
        )
    if spec.training.keep_best and training.progress.best:
        load_best(folder, model, result.adapter_step)
        report(
            "note",
            text=f"the adapter is that of step {result.adapter_step}, validation loss {result.validation_loss:.4f}",
        )
    check_result({name: parameter.detach() for name, parameter in trainable(model).items()})
    report("phase", name="save")
    training.computation.free()  # what draws the losses then fits in its place
    write_adapter(folder, order, training, tokenizer, base_folder, result, report)
    fault_point("train.written")
    for cache in (PREFIX, TOKENS):
        shutil.rmtree(folder / cache, ignore_errors=True)  # gigabytes that no epoch will read again
    return result


def digest_of_material(path: Path) -> str:
    return base_fingerprint(path) if path.is_dir() else sha256_file(path)


def report_gpu(report: Reporter, spec: TrainingSpec, precision: Precision) -> None:
    report("note", text=f"computes on {device_name('cuda')} in {precision}")
    if spec.training.memory == "fast":
        report(
            "note", text="training.memory=fast is a layout for the products of a CPU; on a GPU weights stay as they are"
        )


def held_note(
    base: transformers.PreTrainedModel, elements: int, precision: Precision, quantization: Quantization | None
) -> str:
    full = "bf16" if precision == "bf16" else "fp32"
    read_as_they_are = precision == "int16" and quantization == AS_STORED
    use = (
        "products in integers read them as they are" if read_as_they_are else "they are widened each time they are used"
    )
    bits, full_bytes = 8 * quantized_bytes(base) / elements, elements * DTYPES[precision].itemsize
    return (
        f"{elements:,} weights of the base are in {bits:.2f} bits, {quantized_bytes(base) / 1e6:,.0f} MB instead of "
        f"{full_bytes / 1e6:,.0f} MB in {full}; {use}"
    )


def adapted(
    base: transformers.PreTrainedModel, lora: LoRAConfig, folder: Path, report: Reporter
) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """The model with a fresh adapter, whatever trains in fp32; and what the base lent to it at the start."""
    base.requires_grad_(False)
    moves = moves_weight(lora.init)
    model = get_peft_model(base, (replace(lora, init="default") if moves else lora).to_peft_config())
    assert isinstance(model, PeftModel)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()  # modules_to_save are copies in the dtype of the base
    return model, start(model, lora.init, folder, report, loftq_iterations=lora.loftq_iterations)


def report_rows(report: Reporter, part: RenderedPart, validation: RenderedPart | None) -> None:
    report(
        "rows",
        train=len(part.rows),
        **part.counts(),
        validation=len(validation.rows) if validation else 0,
        validation_dropped=validation.dropped if validation else 0,
    )
    for warning in part.warnings():
        report("warning", text=warning)
    if validation and not validation.rows:
        text = f"there is no validation loss: none of the {validation.given} validation rows fits"
        report("warning", text=text)


def peak_bytes() -> int:
    """Of this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(
    training: TrainingRun,
    part: RenderedPart,
    counts: list[tuple[int, bool]],
    precision: Precision,
    device: Device,
    others_peak_bytes: int,
) -> TrainingResult:
    """`counts` are elements and whether they train, per parameter."""
    progress = training.progress
    losses = dict(progress.validation)
    best = best_evaluation(progress.validation)
    kept = progress.best[0] if training.settings.keep_best and progress.best else progress.step
    return TrainingResult(
        adapter_folder="adapter",
        total_steps=progress.step,
        planned_steps=training.plan.total_steps,
        stopped_early=training.stopped_early and progress.step < training.plan.total_steps,
        adapter_step=kept,
        epochs=progress.step / training.plan.steps_per_epoch,
        training_loss=progress.losses,
        validation_loss=losses.get(kept),
        best_validation_loss=best[1] if best else None,
        training_time_seconds=progress.seconds,
        trained_tokens=progress.trained_tokens,
        tokens_per_s=progress.tokens / progress.seconds,
        trainable_parameters=sum(count for count, trains in counts if trains),
        total_parameters=sum(count for count, _ in counts),
        peak_memory_bytes=peak_bytes() + others_peak_bytes,
        device=device_name(device),
        gpu_peak_memory_bytes=gpu_peak_bytes(device),
        precision="fp32" if precision == "int16" and training.computation.fallback else precision,
        threads=torch.get_num_threads(),
        rows={"trained": len(part.rows), "cut": part.cut, "dropped": part.dropped},
        paths=training.computation.paths,
        fallback=training.computation.fallback,
    )
