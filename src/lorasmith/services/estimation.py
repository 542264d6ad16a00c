"""What a training run would take, before it starts; the job leaves nothing behind."""

from __future__ import annotations

import shutil

from lorasmith.errors import InvalidData, InvalidSpec, JobFailed
from lorasmith.files import new_id
from lorasmith.jobs.folder import EventReader, write_order
from lorasmith.jobs.processes import start_engine
from lorasmith.jobs.runner import follow
from lorasmith.schemas.estimation import MEASURING_S, MOST_MEASURING_S, Estimate, EstimateInputs
from lorasmith.schemas.jobs import Job, JobKind, JobOrder
from lorasmith.schemas.training import TrainingSpec
from lorasmith.services.data import write_lines
from lorasmith.services.data_labels import example_parts
from lorasmith.services.data_sources import find_dataset
from lorasmith.services.in_use import USES
from lorasmith.services.jobs import Watch, create_job
from lorasmith.services.models import resolve_model
from lorasmith.services.training import check_runnable
from lorasmith.services.workbench import Workbench


def estimate(workbench: Workbench, spec: TrainingSpec, watch: Watch, *, measuring_s: float = MEASURING_S) -> Estimate:
    """Predict peak memory, time and disk of the run. A run that does not fit is an answer, not an error."""
    if not 0 < measuring_s <= MOST_MEASURING_S:
        raise InvalidSpec(f"measuring takes above 0 and at most {MOST_MEASURING_S:g} seconds, got {measuring_s:g}")
    model = resolve_model(workbench, spec.model, weights=False)
    parts = example_parts(workbench, spec.data)
    if not parts["train"]:
        raise InvalidData(f"the train part of {spec.data} is empty", hint="import it again with another --split")
    check_runnable(spec, spec.data, has_validation=bool(parts["val"]))
    job_id = new_id("job")
    folder = workbench.path(f"previews/{job_id}")
    inputs = EstimateInputs(
        model_name=model.name,
        model_folder=model.location,
        dataset_name=spec.data,
        train_file=str(folder / "train.jsonl"),
        val_file=str(folder / "val.jsonl") if parts["val"] else None,
        disk_folder=str(workbench.home),
        measuring_s=measuring_s,
    )
    write_order(folder, JobOrder(id=job_id, kind=JobKind.ESTIMATE, spec=spec.model_dump(), inputs=inputs.model_dump()))
    write_lines(folder / "train.jsonl", parts["train"])
    write_lines(folder / "val.jsonl", parts["val"])
    try:
        found = Estimate.model_validate(follow(folder, start_engine(folder), EventReader(folder), watch))
    except JobFailed as error:
        if error.code not in ("crashed", "oom", "rehearsal"):  # those need the log
            shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return found


def queue_estimate(workbench: Workbench, spec: TrainingSpec, *, measuring_s: float = MEASURING_S) -> Job:
    """Let a worker measure; the job's result is an `Estimate`. The dataset must be a stored or built-in one."""
    with USES:
        model = resolve_model(workbench, spec.model, weights=False)
        dataset = find_dataset(workbench, spec.data)
        check_runnable(spec, dataset.name, has_validation=bool(dataset.part_sizes.get("val")))
        folder = workbench.path(dataset.folder)
        inputs = EstimateInputs(
            model_name=model.name,
            model_folder=model.location,
            dataset_name=dataset.name,
            train_file=str(folder / "train.jsonl"),
            val_file=str(folder / "val.jsonl") if dataset.part_sizes.get("val") else None,
            disk_folder=str(workbench.home),
            measuring_s=measuring_s,
        )
        name = f"estimate of {model.name} on {dataset.name}"
        return create_job(workbench, JobKind.ESTIMATE, name, spec.model_dump(), inputs.model_dump())
