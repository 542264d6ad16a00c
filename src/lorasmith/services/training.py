"""Training: resolve what a spec names, run the job, store the adapter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lorasmith.errors import Conflict, InvalidSpec, did_you_mean
from lorasmith.schemas.adapters import Adapter
from lorasmith.schemas.jobs import Job, JobKind
from lorasmith.schemas.training import PRESETS, TrainingInputs, TrainingSpec
from lorasmith.services.data_sources import find_dataset
from lorasmith.services.job_outcomes import adapter_of_job
from lorasmith.services.jobs import Watch, create_job, resumable, run_in_foreground, show_job
from lorasmith.services.models import resolve_model
from lorasmith.services.specs import merge, parse_assignments, parse_spec, read_yaml
from lorasmith.services.workbench import Workbench


def build_spec(
    flags: dict[str, Any], *, config: Path | None = None, assignments: list[str] | None = None
) -> TrainingSpec:
    """Preset, then the YAML file, then flags, then `--set`: later ones win."""
    file_values = read_yaml(config) if config else {}
    given = merge(
        file_values,
        {key: value for key, value in flags.items() if value is not None},
        parse_assignments(assignments or []),
    )
    preset = given.get("preset", "balanced")
    if preset not in PRESETS:
        raise InvalidSpec(
            f"no preset {preset!r}{did_you_mean(str(preset), PRESETS)}", hint=f"presets: {', '.join(PRESETS)}"
        )
    for name in ("model", "data"):
        if not given.get(name):
            raise InvalidSpec(f"{name} is missing", hint=f"give --{name}, or `{name}:` in the config file")
    return parse_spec(TrainingSpec, merge(canonical_names(PRESETS[preset]), canonical_names(given)))


def canonical_names(values: dict[str, Any]) -> dict[str, Any]:
    """One spelling for fields that have two (`r`, `lora_r` → `rank`), so that an override meets what it overrides."""
    result = dict(values)
    for section in ("lora", "training"):
        if isinstance(values.get(section), dict):
            kind = TrainingSpec.model_fields[section].annotation
            result[section] = {alias_names(kind).get(key, key): value for key, value in values[section].items()}
    return result


def alias_names(kind: Any) -> dict[str, str]:
    names: dict[str, str] = {}
    for field_name, field in kind.model_fields.items():
        for choice in getattr(field.validation_alias, "choices", []):
            names[choice] = field_name
    return names


def start_training(workbench: Workbench, spec: TrainingSpec) -> Job:
    """Resolve model and data, choose a free name, and create the job."""
    model = resolve_model(workbench, spec.model)
    dataset = find_dataset(workbench, spec.data)
    if spec.name is not None and spec.name in workbench.adapters.names():
        raise Conflict(f"there is already an adapter named {spec.name!r}", hint="choose another --name")
    name = spec.name or free_name(workbench, f"{Path(model.name).name}-{dataset.name}")
    folder = workbench.path(dataset.folder)
    inputs = TrainingInputs(
        model_name=model.name,
        model_folder=model.location,
        dataset_id=dataset.id,
        dataset_name=dataset.name,
        dataset_sha256=dataset.sha256,
        train_file=str(folder / "train.jsonl"),
        val_file=str(folder / "val.jsonl") if dataset.part_sizes.get("val") else None,
        adapter_name=name,
    )
    return create_job(workbench, JobKind.TRAINING, name, spec.model_dump(), inputs.model_dump())


def free_name(workbench: Workbench, wanted: str) -> str:
    """`wanted`, or the first of `wanted-2`, `wanted-3`, … that no adapter has."""
    wanted = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted)
    taken = workbench.adapters.names()
    number, name = 1, wanted
    while name in taken:
        number += 1
        name = f"{wanted}-{number}"
    return name


def train(workbench: Workbench, job: Job, watch: Watch) -> Adapter:
    """Run a created or interrupted training job in the foreground and return the stored adapter."""
    finished = run_in_foreground(workbench, job, watch)
    return adapter_of_job(workbench, finished.id)


def resume_training(workbench: Workbench, name_or_id: str, watch: Watch) -> Adapter:
    return train(workbench, resumable(show_job(workbench, name_or_id)), watch)
