"""Checkpoints: adapter, optimizer state and position, whole or absent, safetensors and JSON only; and the best weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from lorasmith.engine.models.device import CPU
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.initial import save_adapter
from lorasmith.engine.training.schedule import best_evaluation
from lorasmith.errors import DiskFull, InvalidData, NotFound
from lorasmith.faults import fault_point
from lorasmith.files import (
    MANIFEST,
    STAGING_PREFIX,
    folder_size_bytes,
    read_json,
    staged_folder,
    sweep,
    verify_manifest,
    write_json,
)

FOLDER, BEST_FOLDER = "checkpoints", "best"


@dataclass
class Progress:
    """Where a run stands; all that resuming needs besides tensors."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0
    interval_nats: float = 0.0
    interval_tokens: int = 0
    skipped: int = 0
    left_out: str | None = None  # the last step, its reason and rows, when no step was taken since
    first_loss: float | None = None
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradient_norm: float = 0.0  # of the last step, taken or left out
    best_lost_until: int = 0  # a step: the weights of the best validation up to it are damaged or gone

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best validation whose weights can be had; before step 1 it is still the base model."""
        return best_evaluation([(step, loss) for step, loss in self.validation if step > self.best_lost_until])


def trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def checkpoint_folder(job: Path, step: int) -> Path:
    return job / FOLDER / f"step-{step:06d}"


def save_checkpoint(
    job: Path, model: PeftModel, optimizer: Optimizer, progress: Progress, keep: int, initial: Mapping[str, Tensor]
) -> Path:
    """Write `checkpoints/step-…`; only when it is whole are older ones beyond `keep` removed."""
    target = checkpoint_folder(job, progress.step)
    with staged_folder(target, replace=True, point="checkpoint") as folder:
        save_adapter(model, folder, initial)
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, float] = {}
        for name, parameter in trainable(model).items():
            tensors[f"weight.{name}"] = parameter.detach().contiguous()
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    tensors[f"{key}.{name}"] = value.detach().to(CPU, copy=True).contiguous()  # some share one table
                else:
                    numbers[f"{key}.{name}"] = value
        save_file(tensors, folder / "state.safetensors")
        write_json(folder / "state.json", numbers)
        write_json(folder / "progress.json", asdict(progress))
    for old in whole_checkpoints(job)[:-keep]:
        fault_point("train.retiring")
        shutil.rmtree(old)
    return target


def not_finite(model: PeftModel, optimizer: Optimizer) -> str | None:
    """The first trained tensor whose weights or optimizer state hold a value that is not finite, or None."""
    for name, parameter in trainable(model).items():
        tensors = {"weights": parameter, **optimizer.state[parameter]}
        for key, value in tensors.items():
            if isinstance(value, Tensor) and not torch.isfinite(value).all():  # GPU sync: once per tensor and save
                return f"the {key} of {name}"
    return None


def newest_finite(job: Path) -> Path | None:
    """The newest whole checkpoint whose values are all finite."""
    for folder in reversed(whole_checkpoints(job)):
        if all(torch.isfinite(value).all() for value in load_file(folder / "state.safetensors").values()):
            return folder
    return None


def check_room(job: Path, model: PeftModel, keep: int, saves: int) -> None:
    """Raise `DiskFull` before the first step where the checkpoints of the run would not fit.

    A checkpoint holds the adapter twice, as PEFT stores it and in fp32, and two states of the optimizer: 16 bytes a trained
    weight. One more than is kept is there while the oldest goes.
    """
    weights = sum(parameter.numel() for parameter in trainable(model).values())
    there = sum(folder_size_bytes(folder) for folder in whole_checkpoints(job))
    needed = 16 * weights * min(saves, keep + 1) - there
    free = shutil.disk_usage(job).free
    if needed > free:
        raise DiskFull(
            f"the run's checkpoints need {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free in {job}",
            hint="free some space, or set training.keep_checkpoints to less",
            needed_bytes=needed,
        )


def whole_checkpoints(job: Path) -> list[Path]:
    """Committed checkpoints, oldest first; a folder without manifest was never committed."""
    return sorted(path.parent for path in (job / FOLDER).glob("step-*/manifest.json"))


def newest_checkpoint(job: Path, report: Reporter) -> Path | None:
    """The newest checkpoint whose bytes match its manifest, or None before the first one.

    A damaged one is named in a warning and set aside as `damaged-step-…`, so that it counts nowhere as a checkpoint; what
    a kill in the middle of a save left is removed. Raises `InvalidData` when every checkpoint is damaged.
    """
    for place in (job, job / BEST_FOLDER):
        sweep(place)
    for unfinished in sorted((job / FOLDER).glob(f"{STAGING_PREFIX}*")):
        report("warning", text=f"{FOLDER}/{unfinished.name} was never finished, and is removed")
        shutil.rmtree(unfinished)
    found = sorted((job / FOLDER).glob("step-*"))
    damage = {folder: reason for folder in found if (reason := damage_of(folder))}
    if found and len(damage) == len(found):
        raise InvalidData(
            "no checkpoint is whole, so the run cannot go on: " + "; ".join(damage.values()),
            hint=f"put an undamaged copy back, or remove {job / FOLDER} to begin again with step 1",
        )
    for folder, reason in damage.items():
        report("warning", text=f"{reason}; it is passed over")
        aside = folder.with_name(f"damaged-{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    return max((folder for folder in found if folder not in damage), default=None)


def damage_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not (folder / MANIFEST).is_file():
        return f"{folder} is damaged: {MANIFEST} is missing"
    try:
        verify_manifest(folder)
    except (InvalidData, NotFound) as error:
        return error.message
    return None


def load_checkpoint(folder: Path, model: PeftModel, optimizer: Optimizer) -> Progress:
    """Put weights and optimizer state back, bit for bit."""
    tensors = load_file(folder / "state.safetensors")
    weights = {name.partition(".")[2]: tensors.pop(name) for name in list(tensors) if name.startswith("weight.")}
    load_weights(folder, model, weights)
    parameters = trainable(model)
    for stored, value in (*tensors.items(), *read_json(folder / "state.json").items()):
        key, _, name = stored.partition(".")
        if isinstance(value, Tensor):
            value = value.to(place_of_state(key, parameters[name], optimizer))
        optimizer.state[parameters[name]][key] = value
    return load_progress(folder)


def place_of_state(key: str, parameter: torch.nn.Parameter, optimizer: Optimizer) -> torch.device:
    """With its weight; the number of the step stays on the CPU unless one kernel updates all weights."""
    group = next(group for group in optimizer.param_groups if any(one is parameter for one in group["params"]))
    return parameter.device if key != "step" or group.get("fused") else CPU


def load_weights(folder: Path, model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    parameters = trainable(model)
    if weights.keys() != parameters.keys():
        raise InvalidData(f"{folder} was written by a run with other adapter modules")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def load_progress(folder: Path) -> Progress:
    values = read_json(folder / "progress.json")
    values["validation"] = [(int(step), float(loss)) for step, loss in values["validation"]]
    return Progress(**values)


def best_folder(job: Path, step: int) -> Path:
    return job / BEST_FOLDER / f"step-{step:06d}"


def save_best(job: Path, model: PeftModel, step: int) -> None:
    with staged_folder(best_folder(job, step), replace=True, point="best") as folder:
        save_file(
            {name: parameter.detach().contiguous() for name, parameter in trainable(model).items()},
            folder / "weights.safetensors",
        )


def forget_damaged_best(job: Path, progress: Progress, report: Reporter) -> None:
    """Where the weights of the best validation so far are damaged or gone, say so and let the next one be the best."""
    if progress.best is None:
        return
    step, loss = progress.best
    folder = best_folder(job, step)
    damage = damage_of(folder) if folder.is_dir() else f"{folder} is missing"
    if damage is None:
        return
    progress.best_lost_until = progress.validation[-1][0]
    report(
        "warning",
        text=f"{damage}; the weights of step {step}, the best so far with a validation loss of {loss:.4f}, are lost: the "
        f"adapter will be the best of the validations after step {progress.best_lost_until}, or that of the last step",
    )


def load_best(job: Path, model: PeftModel, step: int) -> None:
    """Make the weights after step `step`, which `save_best` kept, those of the model."""
    folder = best_folder(job, step)
    verify_manifest(folder)
    load_weights(folder, model, load_file(folder / "weights.safetensors"))


def remove_old_best(job: Path) -> None:
    """Keep what some checkpoint calls its best, so that a run which resumes from any of them still has it."""
    bests = [load_progress(folder).best for folder in whole_checkpoints(job)]
    kept = {best_folder(job, best[0]) for best in bests if best}
    for folder in (job / BEST_FOLDER).glob("step-*"):
        if folder not in kept:
            shutil.rmtree(folder)
