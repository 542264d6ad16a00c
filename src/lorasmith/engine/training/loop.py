"""The training loop: one optimizer step after the other, the loss normalised by the step's trained tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.batches import StepPlan
from lorasmith.engine.training.checkpoints import (
    Progress,
    check_room,
    checkpoint_folder,
    newest_finite,
    not_finite,
    remove_old_best,
    save_best,
    save_checkpoint,
    trainable,
)
from lorasmith.engine.training.choices import MICRO_BATCH, Choices
from lorasmith.engine.training.computation import Computation
from lorasmith.engine.training.devices import Devices
from lorasmith.engine.training.guards import LOWER_RATE, REMEMBERED_NORMS, suspects, trouble
from lorasmith.engine.training.memory import shrink_after_kill, summed
from lorasmith.engine.training.optimizers import set_rate
from lorasmith.engine.training.schedule import evaluations_since_best, interval, learning_rate, warmup_length
from lorasmith.errors import JobFailed
from lorasmith.faults import fault_point
from lorasmith.schemas.training import TrainingSettings

KILLED = "killed.json"  # in the job folder


@dataclass
class TrainingRun:
    """All that the loop holds. `model` has fp32 trained weights, the rest is frozen; `initial` is what its base lent them."""

    job: Path
    model: PeftModel
    optimizer: Optimizer
    initial: dict[str, Tensor]
    computation: Computation
    choices: Choices
    plan: StepPlan
    settings: TrainingSettings
    train: Sequence[RenderedExample]
    validation: Sequence[RenderedExample]
    progress: Progress
    devices: Devices = field(default_factory=Devices)

    @property
    def stopped_early(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and evaluations_since_best(self.progress.validation) >= patience

    def finished(self) -> bool:
        return self.progress.step >= self.plan.total_steps or self.stopped_early


def train(run: TrainingRun, report: Reporter) -> bool:
    """Run until it is finished; returns False when a stop was asked for and everything has been saved."""
    settings, plan, progress = run.settings, run.plan, run.progress
    eval_every = interval(settings.eval_every, plan.total_steps, at_least=10)
    save_every = interval(settings.save_every, plan.total_steps, at_least=3)
    log_every = interval(settings.log_every, plan.total_steps, at_least=20)
    if run.devices.first:
        check_room(run.job, run.model, settings.keep_checkpoints, saves=-(-plan.total_steps // save_every))
    warmup = warmup_length(settings.warmup_steps, settings.warmup_ratio, plan.total_steps)
    if settings.warmup_steps and warmup < settings.warmup_steps:
        report("note", text=f"warm-up is {warmup} steps, a tenth of the run, instead of {settings.warmup_steps}")

    def rate_of(step: int) -> float:
        return learning_rate(
            step, peak=settings.learning_rate, warmup=warmup, total=plan.total_steps, kind=settings.lr_scheduler
        )

    with SummaryWriter(str(run.job / "tb")) if run.devices.first else nullcontext() as board:
        if progress.step % eval_every == 0 and progress.step not in dict(progress.validation):
            validate(run, report, board)  # before the first step, or what a stop left out
            if progress.step and run.finished():  # by early stopping, which the stop was ahead of
                log_step(run, report, board, rate_of(progress.step - 1))
                save_and_report(run, report)
        began = time.perf_counter() - progress.seconds
        while not run.finished():
            rate = rate_of(progress.step)
            progress.gradient_norm = optimizer_step(run, report, rate)
            progress.step += 1
            progress.seconds = time.perf_counter() - began
            fault_point("train.step")
            last = progress.step == plan.total_steps
            if progress.step % log_every == 0 or last:
                log_step(run, report, board, rate)
            save_now, stop_requested = run.devices.agree((report.poll(), report.stop_requested))
            stopping = stop_requested and not last
            if (progress.step % eval_every == 0 or last) and not stopping:
                paused = time.perf_counter()
                validate(run, report, board)
                began += time.perf_counter() - paused  # validation is not training time
                if run.finished() and not last:
                    last = True
                    log_step(run, report, board, rate)
            if progress.step % save_every == 0 or last or stopping or save_now:
                save_and_report(run, report)
            if stopping:
                return False
    return True


def save_and_report(run: TrainingRun, report: Reporter) -> None:
    folder = save(run)
    fault_point("train.saved")
    report("checkpoint", step=run.progress.step, folder=str(folder.relative_to(run.job)))


def save(run: TrainingRun) -> Path:
    """Write a checkpoint; raises `JobFailed` and leaves those that are there when a value in it would not be finite.

    No later step mends such a value, so the run need not go on.
    """
    progress = run.progress
    if broken := not_finite(run.model, run.optimizer):
        rows = [run.train[index].row for index in run.plan.row_indices(progress.step - 1)]
        raise JobFailed(
            f"after step {progress.step} {broken} are not finite; {progress.left_out or f'its rows {rows}'}; "
            f"{last_finite(run)}",
            code="non_finite",
            hint=LOWER_RATE,
        )
    if run.devices.first:
        save_checkpoint(run.job, run.model, run.optimizer, run.progress, run.settings.keep_checkpoints, run.initial)
        remove_old_best(run.job)
    return checkpoint_folder(run.job, run.progress.step)


def last_finite(run: TrainingRun) -> str:
    folder = newest_finite(run.job)
    if folder is None:
        return "there is no finite checkpoint"
    return f"the last finite adapter is in {folder.relative_to(run.job)}"


def optimizer_step(run: TrainingRun, report: Reporter, rate: float) -> float:
    """One update; returns the gradient norm before clipping.

    The mean is over all trained tokens of the step, so that 16 rows at once and 4 times 4 rows give the same update.
    """
    step, progress = run.progress.step, run.progress
    set_rate(run.optimizer, rate)
    indices = run.plan.row_indices(step)
    rows = [run.train[index] for index in indices]
    trained_tokens = sum(row.trained_tokens for row in rows)
    total_nats = summed(
        run.computation,
        run.devices,
        indices,
        run.train,
        lambda batch: run.computation.gradients(batch, run.train, scale=1 / trained_tokens, step=step),
        lambda before, after: shrunk(run, report, f"step {step + 1} does not fit into memory", before, after),
        trained=True,
    )
    run.devices.sum_gradients(trainable(run.model).values())
    norm = torch.nn.utils.clip_grad_norm_(trainable(run.model).values(), run.settings.max_grad_norm).item()
    if step == 0 and norm == 0:
        raise JobFailed("no gradient reaches the adapter, so nothing would be learned", code="no_gradient")
    loss = total_nats / trained_tokens
    if progress.first_loss is None and math.isfinite(loss):
        progress.first_loss = loss
    reason = trouble(loss, norm, progress.norms, progress.first_loss)
    if reason is None:
        run.optimizer.step()
        progress.left_out = None
        progress.norms = [*progress.norms, norm][-REMEMBERED_NORMS:]
        progress.interval_nats += total_nats
        progress.interval_tokens += trained_tokens
    run.optimizer.zero_grad(set_to_none=True)
    if reason is not None:
        skip(run, report, reason, suspects(run.computation, indices, run.train))
    progress.tokens += sum(len(row.ids) for row in rows)
    progress.trained_tokens += trained_tokens
    return norm


def heed_kill(run: TrainingRun, report: Reporter) -> None:
    """Where whoever started this process noted that the system killed the one before it: compute half as much at once."""
    note = run.job / KILLED
    if not run.devices.agree(note.exists()):
        return
    sizes = shrink_after_kill(run.computation, run.devices, run.plan, run.progress.step, run.train, run.validation)
    if sizes:
        shrunk(run, report, "the last process was killed by the system", *sizes)
    else:
        report("warning", text="the last process was killed by the system, and each row is computed alone already")
    if run.devices.first:
        note.unlink()


def shrunk(run: TrainingRun, report: Reporter, why: str, before: int, after: int) -> None:
    """Drop what a step has summed so far, and keep the smaller micro-batch for the rest of the run."""
    run.optimizer.zero_grad(set_to_none=True)
    run.choices.change(MICRO_BATCH, after)
    unit = run.computation.unit
    report("warning", text=f"{why}: {after} {unit} at once from now on instead of {before}, for the same update")


def skip(run: TrainingRun, report: Reporter, reason: str, rows: list[int]) -> None:
    """Leave a step out and name its rows; raises `JobFailed`, with all saved, when it has happened too often."""
    run.progress.skipped += 1
    step = run.progress.step + 1
    run.progress.left_out = f"step {step} is left out: {reason}; rows {rows}"
    if run.progress.skipped > run.settings.max_skipped_steps:
        if not_finite(run.model, run.optimizer):
            kept = last_finite(run)
        else:
            kept = f"the adapter as it was before is in {save(run).relative_to(run.job)}"
        raise JobFailed(
            f"step {step} cannot be taken: {reason}; {run.settings.max_skipped_steps} steps were left out before it; "
            f"rows {rows}; {kept}",
            code="non_finite",
            hint=LOWER_RATE,
        )
    report("warning", text=run.progress.left_out)


def log_step(run: TrainingRun, report: Reporter, board: SummaryWriter | None, rate: float) -> None:
    progress, plan = run.progress, run.plan
    if not progress.interval_tokens:
        return  # every step of the interval was left out
    loss = progress.interval_nats / progress.interval_tokens
    progress.interval_nats, progress.interval_tokens = 0.0, 0
    progress.losses.append(loss)
    tokens_per_s = progress.tokens / progress.seconds
    report(
        "step",
        step=progress.step,
        total_steps=plan.total_steps,
        epoch=round(progress.step / plan.steps_per_epoch, 3),
        loss=loss,
        learning_rate=rate,
        grad_norm=progress.gradient_norm,
        tokens_per_s=tokens_per_s,
        eta_s=(plan.total_steps - progress.step) * progress.seconds / progress.step,
    )
    if board is None:
        return
    board.add_scalar("train/loss", loss, progress.step)
    board.add_scalar("train/learning_rate", rate, progress.step)
    board.add_scalar("train/grad_norm", progress.gradient_norm, progress.step)
    board.add_scalar("train/tokens_per_s", tokens_per_s, progress.step)


def validate(run: TrainingRun, report: Reporter, board: SummaryWriter | None = None) -> None:
    """Mean loss in nats per trained token over the validation part, in the training precision; keeps the best weights."""
    rows = run.validation
    if not rows:
        return
    nats = summed(
        run.computation,
        run.devices,
        range(len(rows)),
        rows,
        lambda batch: run.computation.loss(batch, rows),
        lambda before, after: shrunk(run, report, "validation does not fit into memory", before, after),
        trained=False,
    )
    loss = nats / sum(row.trained_tokens for row in rows)
    progress = run.progress
    progress.validation.append((progress.step, loss))
    report("evaluation", step=progress.step, loss=loss, best_loss=progress.best[1] if progress.best else None)
    fault_point("train.evaluated")
    if run.devices.first and run.settings.keep_best and progress.best == (progress.step, loss):
        save_best(run.job, run.model, progress.step)
    if board is not None:
        board.add_scalar("validation/loss", loss, progress.step)
