"""Augmentation: create the job, run it, go on with it."""

from __future__ import annotations

import os
from importlib.util import find_spec

from lorasmith.endpoints import check_endpoint, parse_endpoint, read_key
from lorasmith.errors import Conflict, InvalidData, InvalidSpec, NotFound
from lorasmith.files import read_json
from lorasmith.jobs.folder import ORDER, write_order
from lorasmith.schemas.augmentation import AugmentationInputs, AugmentationSpec
from lorasmith.schemas.data import Dataset
from lorasmith.schemas.jobs import Event, Job, JobKind, JobOrder, JobStatus, now
from lorasmith.schemas.teachers import Reach
from lorasmith.services.data import part_path
from lorasmith.services.data_sources import named_dataset
from lorasmith.services.jobs import Watch, create_job, resumable, run_in_foreground, show_job
from lorasmith.services.workbench import Workbench


def start_augmentation(workbench: Workbench, spec: AugmentationSpec, reach: Reach) -> Job:
    """Check dataset, endpoint, key and name, then create the job. `reach` is what the shell allows."""
    dataset = named_dataset(workbench, spec.data)
    check_dataset(dataset, spec)
    check_endpoint(parse_endpoint(spec.teacher.endpoint), reach)
    read_key(spec.teacher.api_key_env, os.environ)
    if spec.name is not None and spec.name in workbench.datasets.names():
        raise Conflict(f"there is already a dataset named {spec.name!r}", hint="choose another --name")
    inputs = AugmentationInputs(
        dataset_id=dataset.id,
        dataset_name=dataset.name,
        dataset_sha256=dataset.sha256,
        train_file=str(part_path(workbench, dataset, "train")),
        reach=reach,
    )
    name = spec.name or f"{dataset.name[:45]}-{spec.method}"
    order = spec.model_dump(mode="json"), inputs.model_dump(mode="json")
    return create_job(workbench, JobKind.AUGMENTATION, name, *order, auto_resume=False)


def check_dataset(dataset: Dataset, spec: AugmentationSpec) -> None:
    if dataset.kind != "sft":
        raise InvalidData(
            f"the dataset {dataset.name!r} holds rows of format {dataset.format}, expected requests with one answer",
            hint="augment the rows with the wanted answers alone",
        )
    if not dataset.statistics.get("roles"):
        raise InvalidData(
            f"the dataset {dataset.name!r} holds plain texts (format {dataset.format}), which have no request and no "
            f"answer to {spec.method}"
        )


def augment(workbench: Workbench, job: Job, watch: Watch) -> Job:
    """Run a created or stopped job in the foreground."""
    if find_spec("py3langid") is None:
        text = "languages are not compared: py3langid is missing (pip install 'lorasmith[data]')"
        watch(Event(seq=0, time=now(), type="note", data={"text": text}))
    return run_in_foreground(workbench, job, watch)


def resume_augmentation(
    workbench: Workbench,
    name_or_id: str,
    watch: Watch,
    *,
    budget_requests: int | None = None,
    budget_tokens: int | None = None,
) -> Job:
    """Go on asking for the rows that are missing or have failed; a budget that is given takes the place of the old one."""
    job = show_job(workbench, name_or_id)
    has_failed_rows = bool((job.result or {}).get("rows", {}).get("failed"))
    if not (job.kind is JobKind.AUGMENTATION and job.status is JobStatus.COMPLETED and has_failed_rows):
        job = resumable(job, JobKind.AUGMENTATION)
    order = order_of(workbench, job)
    spec, inputs = AugmentationSpec.model_validate(order.spec), AugmentationInputs.model_validate(order.inputs)
    source_of(workbench, inputs)
    read_key(spec.teacher.api_key_env, os.environ)
    if budget_requests is not None:
        spec.teacher.budget_requests = budget_requests
    if budget_tokens is not None:
        spec.teacher.budget_tokens = budget_tokens
    order.spec = spec.model_dump(mode="json")
    write_order(workbench.path(job.folder), order)
    job = workbench.jobs.change(job.id, lambda stored: setattr(stored, "spec", order.spec))
    return augment(workbench, job, watch)


def order_of(workbench: Workbench, job: Job) -> JobOrder:
    if job.kind is not JobKind.AUGMENTATION:
        raise InvalidSpec(
            f"{job.id} is a job of kind {job.kind}, expected one of data augment", hint="lorasmith jobs list"
        )
    return JobOrder.model_validate(read_json(workbench.path(job.folder) / ORDER))


def source_of(workbench: Workbench, inputs: AugmentationInputs) -> Dataset:
    """The dataset that a job augments. Raises `NotFound` when it is gone, and `Conflict` when it is another by now."""
    dataset = workbench.datasets.get(inputs.dataset_id)
    if dataset is None:
        raise NotFound(f"the dataset {inputs.dataset_name!r} ({inputs.dataset_id}), which the job augments, is removed")
    if dataset.sha256 != inputs.dataset_sha256:
        raise Conflict(f"the dataset {inputs.dataset_name!r} has other rows than when the job began")
    return dataset
