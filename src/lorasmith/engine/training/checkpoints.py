"""Checkpoints: adapter, optimizer state and position, whole or absent, safetensors only."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from lorasmith.errors import InvalidData, NotFound
from lorasmith.files import read_json, staged_folder, verify_manifest, write_json

FOLDER = "checkpoints"


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
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


def trainable(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_checkpoint(job: Path, model: PeftModel, optimizer: torch.optim.AdamW, progress: Progress, keep: int) -> Path:
    """Write `checkpoints/step-…`; only when it is whole are older ones beyond `keep` removed."""
    target = job / FOLDER / f"step-{progress.step:06d}"
    with staged_folder(target, replace=True) as folder:
        model.save_pretrained(str(folder), save_embedding_layers=False)
        state = optimizer.state
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in trainable(model).items():
            tensors[f"weight.{name}"] = parameter.detach().contiguous()
            for key, value in state[parameter].items():
                tensors[f"{key}.{name}"] = value.detach().contiguous()
        save_file(tensors, folder / "state.safetensors")
        write_json(folder / "progress.json", asdict(progress))
    for old in whole_checkpoints(job)[:-keep]:
        shutil.rmtree(old)
    return target


def whole_checkpoints(job: Path) -> list[Path]:
    """Committed checkpoints, oldest first; a folder without manifest was never committed."""
    return sorted(path.parent for path in (job / FOLDER).glob("step-*/manifest.json"))


def newest_checkpoint(job: Path) -> Path | None:
    """The newest checkpoint whose bytes match its manifest."""
    for folder in reversed(whole_checkpoints(job)):
        try:
            verify_manifest(folder)
        except (InvalidData, NotFound):
            continue  # damaged after it was written; an older one will do
        return folder
    return None


def load_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.AdamW) -> Progress:
    """Put weights and optimizer state back, bit for bit."""
    tensors = load_file(folder / "state.safetensors")
    parameters = trainable(model)
    stored = {name.partition(".")[2] for name in tensors if name.startswith("weight.")}
    if stored != set(parameters):
        raise InvalidData(f"{folder} was written by a run with other adapter modules")
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"weight.{name}"])
        optimizer.state[parameter] = {
            key: tensors[f"{key}.{name}"].clone()
            for key in ("step", "exp_avg", "exp_avg_sq")
            if f"{key}.{name}" in tensors
        }
    values = read_json(folder / "progress.json")
    values["validation"] = [(int(step), float(loss)) for step, loss in values["validation"]]
    return Progress(**values)
