"""A training job: dataset and base model in, a PEFT folder and its measurements out."""

from __future__ import annotations

import resource
from pathlib import Path

import torch
import transformers
from peft import get_peft_model

from lorasmith.engine.data.examples import RenderedPart, read_examples, render_part
from lorasmith.engine.data.templates import choose_template
from lorasmith.engine.lora.config import LoRAConfig, resolve_target_modules
from lorasmith.engine.models.loading import context_tokens, eos_token_ids, load_model, load_tokenizer, model_folder
from lorasmith.engine.models.precision import DTYPES, Precision, choose_precision
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.artifacts import write_adapter
from lorasmith.engine.training.batches import plan_steps
from lorasmith.engine.training.checkpoints import Progress, load_checkpoint, newest_checkpoint, trainable
from lorasmith.engine.training.choices import Choices, choose_computation
from lorasmith.engine.training.guards import check_result
from lorasmith.engine.training.loop import TrainingRun, train
from lorasmith.schemas.jobs import JobOrder
from lorasmith.schemas.training import TrainingInputs, TrainingResult, TrainingSpec


def run(order: JobOrder, folder: Path, report: Reporter) -> TrainingResult:
    """Train, or go on from the newest whole checkpoint of the folder. Raises `Interrupted` when asked to stop."""
    spec = TrainingSpec.model_validate(order.spec)
    inputs = TrainingInputs.model_validate(order.inputs)
    choices = Choices(folder, report)
    precision = choices.once("precision", lambda: choose_precision(spec.training.precision))

    report("phase", name="load")
    base_folder = model_folder(inputs.model_folder)
    tokenizer = load_tokenizer(base_folder)
    base = load_model(base_folder, DTYPES[precision])
    stop_ids = eos_token_ids(base, tokenizer)

    report("phase", name="tokenize")
    examples = read_examples(Path(inputs.train_file))
    if spec.template is not None or any(example.messages is not None for example in examples):
        choose_template(tokenizer, spec.template)
    context = context_tokens(base)
    max_tokens = min(spec.training.max_seq_length, context or spec.training.max_seq_length)
    limits = {"max_tokens": max_tokens, "too_long": spec.training.too_long}
    part = render_part(tokenizer, examples, stop_ids, **limits)  # type: ignore[arg-type]
    validation = validation_part(inputs, tokenizer, stop_ids, max_tokens)
    report_rows(report, part, validation)

    torch.manual_seed(spec.training.seed)
    lora = LoRAConfig(
        r=spec.lora.rank,
        alpha=spec.lora.alpha,
        dropout=spec.lora.dropout,
        target_modules=resolve_target_modules(base, spec.lora.target_modules),
        use_rslora=spec.lora.use_rslora,
    )
    base.requires_grad_(False)
    model = get_peft_model(base, lora.to_peft_config())
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = TrainingRun(
        job=folder,
        model=model,
        optimizer=torch.optim.AdamW(
            parameters, lr=spec.training.learning_rate, weight_decay=spec.training.weight_decay, fused=True
        ),
        computation=choose_computation(choices, model, tokenizer, spec.training, precision, part.rows, report),
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
    )
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        training.progress = load_checkpoint(checkpoint, model, training.optimizer)
        report("resumed", step=training.progress.step, checkpoint=checkpoint.name)

    report("phase", name="train")
    if not train(training, report):
        raise report.stop(
            f"stopped after step {training.progress.step} of {training.plan.total_steps}; everything is saved",
            hint=f"lorasmith train --resume {order.id}",
        )
    check_result({name: parameter.detach() for name, parameter in trainable(model).items()})
    report("phase", name="save")
    result = measured(training, part, counts, precision)
    write_adapter(folder, order, training, tokenizer, base_folder, result)
    return result


def validation_part(
    inputs: TrainingInputs, tokenizer: transformers.PreTrainedTokenizerBase, stop_ids: set[int], max_tokens: int
) -> RenderedPart | None:
    """The validation rows that fit; rows that do not are left out of this number, and counted."""
    if inputs.val_file is None:
        return None
    return render_part(
        tokenizer, read_examples(Path(inputs.val_file)), stop_ids, max_tokens=max_tokens, too_long="drop"
    )


def report_rows(report: Reporter, part: RenderedPart, validation: RenderedPart | None) -> None:
    report(
        "rows",
        train=len(part.rows),
        cut=part.cut,
        dropped=part.dropped,
        tokens=part.tokens,
        trained_tokens=part.trained_tokens,
        validation=len(validation.rows) if validation else 0,
        validation_dropped=validation.dropped if validation else 0,
    )


def measured(
    training: TrainingRun, part: RenderedPart, counts: list[tuple[int, bool]], precision: Precision
) -> TrainingResult:
    """`counts` are elements and whether they train, per parameter."""
    progress = training.progress
    losses = [loss for _, loss in progress.validation]
    return TrainingResult(
        adapter_folder="adapter",
        total_steps=progress.step,
        epochs=progress.step / training.plan.steps_per_epoch,
        training_loss=progress.losses,
        validation_loss=losses[-1] if losses else None,
        best_validation_loss=min(losses) if losses else None,
        training_time_seconds=progress.seconds,
        trained_tokens=progress.trained_tokens,
        tokens_per_s=progress.tokens / progress.seconds,
        trainable_parameters=sum(count for count, trains in counts if trains),
        total_parameters=sum(count for count, _ in counts),
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        precision=precision,
        threads=torch.get_num_threads(),
        rows={"trained": len(part.rows), "cut": part.cut, "dropped": part.dropped},
    )
