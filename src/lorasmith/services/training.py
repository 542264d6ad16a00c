"""Training: resolve what a spec names, run the job, store the adapter."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorasmith.errors import Conflict, InvalidSpec, MissingExtra, did_you_mean
from lorasmith.schemas.adapters import Adapter
from lorasmith.schemas.data import Dataset
from lorasmith.schemas.jobs import ACTIVE, Job, JobKind, JobStatus
from lorasmith.schemas.training import BITSANDBYTES_OPTIMIZERS, TrainingInputs, TrainingSpec
from lorasmith.schemas.training_presets import PRESETS
from lorasmith.services.data import tokens_folder
from lorasmith.services.data_sources import find_dataset
from lorasmith.services.in_use import USES
from lorasmith.services.job_outcomes import adapter_of_job
from lorasmith.services.jobs import Watch, create_job, resumable, run_in_foreground, show_job
from lorasmith.services.models import resolve_model
from lorasmith.services.specs import merge, parse_assignments, parse_spec, read_yaml
from lorasmith.services.workbench import Workbench

USER_PRESETS = "presets"


def build_spec(
    flags: dict[str, Any],
    *,
    config: Path | None = None,
    assignments: list[str] | None = None,
    home: Path | None = None,
) -> TrainingSpec:
    """Preset, then the YAML file, then flags, then `--set`: later ones win. `home` may hold presets of the user's own."""
    layers = [
        canonical_names(read_yaml(config) if config else {}),
        {key: value for key, value in flags.items() if value is not None},
        merge(*(canonical_names(parse_assignments([assignment])) for assignment in assignments or [])),
    ]
    given: dict[str, Any] = {}
    for layer in layers:
        given = merge(without_other_warmup(given, layer), layer)
    preset = find_preset(given.get("preset", "balanced"), home)
    for name in ("model", "data"):
        if not given.get(name):
            raise InvalidSpec(f"{name} is missing", hint=f"give --{name}, or `{name}:` in the config file")
    return parse_spec(TrainingSpec, merge(without_other_warmup(preset, given), given))


def find_preset(name: Any, home: Path | None) -> dict[str, Any]:
    own = {path.stem: path for path in sorted((home / USER_PRESETS).glob("*.yaml"))} if home else {}
    if not isinstance(name, str):
        raise InvalidSpec(f"preset has to be a name, got {name!r}")
    if name in own and name in PRESETS:
        raise InvalidSpec(f"{own[name]} has the name of a built-in preset", hint="give the file another name")
    if name in own:
        return read_preset(own[name])
    if name not in PRESETS:
        yours = ", ".join(own) or f"none, they are files {USER_PRESETS}/NAME.yaml in the home folder"
        raise InvalidSpec(
            f"no preset {name!r}{did_you_mean(str(name), [*PRESETS, *own])}",
            hint=f"presets: {', '.join(PRESETS)}; your own: {yours}",
        )
    return canonical_names(PRESETS[name])


def read_preset(path: Path) -> dict[str, Any]:
    """The sections of a preset file, in canonical names. Raises `InvalidSpec` that names the file and the field."""
    values = read_yaml(path)
    for section in values:
        if section not in ("lora", "training"):
            raise InvalidSpec(f"{path} holds {section!r}; a preset has the sections `lora` and `training` alone")
    try:
        values = canonical_names(values)
        parse_spec(TrainingSpec, {"model": "any", "data": "any", **values})
    except InvalidSpec as error:
        raise InvalidSpec(f"{path}: {error.message}", hint=error.hint) from error
    return values


def without_other_warmup(before: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What was said before less its warm-up where a later source gives one: it is one setting with two units."""
    own, wanted = before.get("training"), given.get("training")
    kinds = ("warmup_steps", "warmup_ratio")
    if not (isinstance(own, dict) and isinstance(wanted, dict)):
        return before
    if not any(wanted.get(kind) is not None for kind in kinds):
        return before
    return {**before, "training": {key: value for key, value in own.items() if key not in kinds}}


def canonical_names(values: dict[str, Any]) -> dict[str, Any]:
    """One spelling for fields that have two (`r`, `lora_r` → `rank`), so that an override meets what it overrides.

    Raises `InvalidSpec` where both spellings of a field are given.
    """
    result = dict(values)
    for section in ("lora", "training"):
        if isinstance(values.get(section), dict):
            names = alias_names(TrainingSpec.model_fields[section].annotation)
            spelled: dict[str, str] = {}
            for key in values[section]:
                other = spelled.setdefault(names.get(key, key), key)
                if other != key:
                    raise InvalidSpec(
                        f"{section}.{other}={values[section][other]} and {section}.{key}={values[section][key]} "
                        "are one field under two names",
                        hint="give one of them",
                    )
            result[section] = {name: values[section][key] for name, key in spelled.items()}
    return result


def alias_names(kind: Any) -> dict[str, str]:
    names: dict[str, str] = {}
    for field_name, field in kind.model_fields.items():
        for choice in getattr(field.validation_alias, "choices", []):
            names[choice] = field_name
    return names


def start_training(
    workbench: Workbench, spec: TrainingSpec, *, validation_data: str | None = None, **facts: Any
) -> Job:
    """Resolve model and data, choose a free name, and create the job. `facts` are further fields of `Job`.

    Validation rows are the data's own, or the training part of `validation_data`, another dataset.
    """
    with USES:
        model = resolve_model(workbench, spec.model)
        dataset = find_dataset(workbench, spec.data)
        if spec.name is not None and spec.name in taken_names(workbench):
            raise Conflict(f"there is already an adapter or a run named {spec.name!r}", hint="choose another --name")
        validation = validation_file(workbench, dataset, validation_data)
        check_runnable(spec, dataset.name, has_validation=validation is not None)
        name = spec.name or free_name(workbench, f"{Path(model.name).name}-{dataset.name}")
        folder = workbench.path(dataset.folder)
        inputs = TrainingInputs(
            model_name=model.name,
            model_folder=model.location,
            dataset_id=dataset.id,
            dataset_name=dataset.name,
            dataset_sha256=dataset.sha256,
            train_file=str(folder / "train.jsonl"),
            val_file=validation,
            tokens_folder=str(tokens_folder(workbench, dataset.id)),
            adapter_name=name,
        )
        if spec.training.device == "cuda":
            facts.setdefault("device", "cuda")  # it waits for the GPU and not for cores
        return create_job(workbench, JobKind.TRAINING, name, spec.model_dump(), inputs.model_dump(), **facts)


def validation_file(workbench: Workbench, dataset: Dataset, other: str | None) -> str | None:
    if other is not None:
        return str(workbench.path(find_dataset(workbench, other).folder) / "train.jsonl")
    return str(workbench.path(dataset.folder) / "val.jsonl") if dataset.part_sizes.get("val") else None


def clone_training(workbench: Workbench, job: Job, changes: dict[str, Any], **facts: Any) -> Job:
    """Create a job like another training job, with some fields changed and a name of its own."""
    if job.kind is not JobKind.TRAINING:
        raise Conflict(f"{job.id} is a job of kind {job.kind}, and only training can be copied")
    given = {key: value for key, value in canonical_names(changes).items() if value is not None}
    spec = parse_spec(TrainingSpec, merge({**job.spec, "name": None}, given))
    return start_training(workbench, spec, **facts)


def check_runnable(spec: TrainingSpec, dataset: str, *, has_validation: bool) -> None:
    """Raise before the job exists for what the engine would refuse after loading the model."""
    if spec.training.optimizer in BITSANDBYTES_OPTIMIZERS and find_spec("bitsandbytes") is None:
        raise MissingExtra(f"optimizer {spec.training.optimizer}", "quant")
    check_quantization(spec)
    if spec.training.needs_validation and not has_validation:
        raise InvalidSpec(
            f"{spec.training.needs_validation} needs validation rows, and dataset {dataset!r} has none",
            hint="import it again with a validation part: lorasmith data import … --split 80/10/10",
        )


def check_quantization(spec: TrainingSpec) -> None:
    """Raise for an adapter that does not go with its base as it is stored while training."""
    init, quantization = spec.lora.init, spec.training.quantization
    if init == "loftq" and not spec.training.quantizes:
        raise InvalidSpec(
            "lora.init loftq starts from what quantising the base loses, and training.quantization is none",
            hint="--set training.quantization=nf4, or --set lora.init=pissa",
        )
    if spec.lora.use_dora and spec.training.quantizes:
        raise InvalidSpec(
            f"lora.use_dora measures the base's weights in each step, and training.quantization={quantization} stores them in fewer bits",
            hint="train with lora.use_dora=false, or with training.quantization=none",
        )


def taken_names(workbench: Workbench) -> set[str]:
    """Names of adapters, and those that runs will give to theirs."""
    return workbench.adapters.names() | workbench.jobs.names_of({JobStatus.QUEUED, *ACTIVE}, JobKind.TRAINING)


def free_name(workbench: Workbench, wanted: str) -> str:
    """`wanted`, or the first of `wanted-2`, `wanted-3`, … that no adapter has or will have."""
    wanted = re.sub(r"[^A-Za-z0-9._-]+", "-", wanted)
    taken = taken_names(workbench)
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
    return train(workbench, resumable(show_job(workbench, name_or_id), JobKind.TRAINING), watch)
