"""What a completed job leaves in the store: files first, then the row. Doing it twice changes nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from lorasmith.faults import fault_point
from lorasmith.files import folder_size_bytes, read_json, sha256_bytes, sha256_file, staged_folder
from lorasmith.jobs.folder import ORDER
from lorasmith.schemas.adapters import Adapter
from lorasmith.schemas.evaluation import Evaluation
from lorasmith.schemas.jobs import Job, JobKind
from lorasmith.schemas.training import TrainingInputs, TrainingResult
from lorasmith.services.workbench import Workbench


def keep_outcome(workbench: Workbench, job: Job, result: dict[str, Any]) -> Adapter | None:
    """Returns the adapter that a training job has made."""
    if job.kind is JobKind.TRAINING:
        return keep_adapter(workbench, job, TrainingResult.model_validate(result))
    if job.kind is JobKind.EVALUATION:
        keep_evaluation(workbench, job, Evaluation.model_validate(result))
    return None


def adapter_digest(folder: Path) -> str:
    """One identity for an adapter's content: the digest of its config's and weights' digests."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return sha256_bytes("\n".join(f"{name} {sha256_file(folder / name)}" for name in names).encode())


def keep_adapter(workbench: Workbench, job: Job, result: TrainingResult) -> Adapter:
    """Copy the job's adapter into the store."""
    if any(adapter.training_job_id == job.id for adapter in workbench.adapters.list()):
        return adapter_of_job(workbench, job.id)
    inputs = TrainingInputs.model_validate(read_json(workbench.path(job.folder) / ORDER)["inputs"])
    adapter_id = f"adapter_{job.id.removeprefix('job_')}"  # the same after a crash between the copy and its row
    folder = f"adapters/{adapter_id}"
    made = workbench.path(job.folder) / result.adapter_folder
    with staged_folder(workbench.path(folder), replace=True, point="kept-adapter") as staging:
        shutil.copytree(made, staging, dirs_exist_ok=True)
        digest = adapter_digest(staging)
    taken = inputs.adapter_name in workbench.adapters.names()  # since the run began
    adapter = Adapter(
        id=adapter_id,
        name=f"{inputs.adapter_name}-{adapter_id[-6:].lower()}" if taken else inputs.adapter_name,
        base_model=inputs.model_name,
        base_folder=inputs.model_folder,
        training_job_id=job.id,
        dataset=inputs.dataset_name,
        dataset_id=inputs.dataset_id,
        dataset_sha256=inputs.dataset_sha256,
        folder=folder,
        digest=digest,
        size_bytes=folder_size_bytes(workbench.path(folder)),
        lora_config=job.spec["lora"],
        metrics={"validation_loss": result.validation_loss, "training_time_seconds": result.training_time_seconds},
    )
    added = workbench.adapters.add(adapter)
    fault_point("outcome.added")
    return added


def adapter_of_job(workbench: Workbench, job_id: str) -> Adapter:
    return next(adapter for adapter in workbench.adapters.list() if adapter.training_job_id == job_id)


def keep_evaluation(workbench: Workbench, job: Job, evaluation: Evaluation) -> Evaluation:
    """Copy the job's report and numbers into the store."""
    kept = workbench.evaluations.get(evaluation.id)
    if kept is not None:
        return kept
    folder = f"evaluations/{evaluation.id}"
    with staged_folder(workbench.path(folder), replace=True) as staging:  # without a row it is what a crash has left
        shutil.copytree(workbench.path(job.folder) / evaluation.folder, staging, dirs_exist_ok=True)
    return workbench.evaluations.add(evaluation.model_copy(update={"folder": folder}))
