"""Jobs in the shape of the REST API."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lorasmith.api.problems import without_paths
from lorasmith.files import MANIFEST, folder_size_bytes
from lorasmith.jobs.events import newest
from lorasmith.jobs.folder import EVENTS, checkpoint_folders
from lorasmith.schemas.api_jobs import CheckpointResource, JobResource
from lorasmith.schemas.api_training import QLoRAConfigRequest
from lorasmith.schemas.jobs import Job, JobKind, JobStatus
from lorasmith.schemas.training import LoRASpec, TrainingSettings
from lorasmith.services.workbench import Workbench

POINT_FIELDS = ("learning_rate", "grad_norm", "tokens_per_s", "eta_s", "epoch")


def resource(workbench: Workbench, job: Job) -> JobResource:
    """A job with what its newest events say."""
    training = job.spec.get("training", {}) if job.kind is JobKind.TRAINING else {}
    return JobResource(
        id=job.id,
        kind=job.kind,
        name=job.name,
        description=job.description,
        base_model=job.base_model,
        dataset_id=job.dataset_id,
        lora_config=LoRASpec.model_construct(**job.spec["lora"]) if training else None,  # as it was stored
        training_config=TrainingSettings.model_construct(**training) if training else None,
        qlora_config=qlora_config(training) if training else None,
        status=job.status,
        reason_code=job.reason_code,
        priority=job.priority,
        cores=job.cores,
        adapter_id=job.adapter_id,
        adapter_path=f"adapters/{job.adapter_id}" if job.adapter_id else None,
        created_at=job.created_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
        error=without_paths(job.reason, workbench.home) if job.reason else None,
        **standing(workbench, job),
    )


def standing(workbench: Workbench, job: Job) -> dict[str, Any]:
    """How far it is: the result of a completed run, else its newest step and evaluation."""
    if job.result is not None and job.kind is JobKind.TRAINING:
        result = job.result
        metrics = {key: result[key] for key in ("validation_loss", "training_time_seconds", "tokens_per_s")}
        losses = result["training_loss"]
        return {
            "progress": 100.0,
            "current_step": result["total_steps"],
            "total_steps": result["planned_steps"],
            "current_loss": losses[-1] if losses else None,
            "best_loss": result["best_validation_loss"],
            "metrics": {**metrics, "peak_memory_bytes": result["peak_memory_bytes"]},
        }
    found = newest(workbench.path(job.folder) / EVENTS, "step", "evaluation")
    step = found["step"].data if "step" in found else {}
    evaluation = found["evaluation"].data if "evaluation" in found else {}
    done, total = step.get("step", 0), step.get("total_steps", 0)
    metrics = {key: step[key] for key in POINT_FIELDS if key in step}
    return {
        "progress": 100.0 if job.status is JobStatus.COMPLETED else 100 * done / total if total else 0.0,
        "current_step": done,
        "total_steps": total,
        "current_loss": step.get("loss"),
        "best_loss": evaluation.get("best_loss"),
        "metrics": metrics | ({"validation_loss": evaluation["loss"]} if evaluation else {}),
    }


def qlora_config(training: dict[str, Any]) -> QLoRAConfigRequest:
    quantization = training["quantization"]
    return QLoRAConfigRequest(
        enabled=quantization != "none",
        bits=8 if quantization == "int8" else 4,
        quant_type="fp4" if quantization == "fp4" else "nf4",
        double_quant=training["double_quantization"],
        compute_dtype={"bf16": "bfloat16", "fp32": "float32"}.get(training["precision"]),
    )


def checkpoints(workbench: Workbench, job: Job) -> list[CheckpointResource]:
    """Those that are whole, oldest first."""
    found = (checkpoint_resource(folder) for folder in checkpoint_folders(workbench.path(job.folder)))
    return [checkpoint for checkpoint in found if checkpoint is not None]


def checkpoint_resource(folder: Path) -> CheckpointResource | None:
    """None for one that the engine removes meanwhile."""
    try:
        return CheckpointResource(
            id=folder.name,
            step=int(folder.name.removeprefix("step-")),
            size_bytes=folder_size_bytes(folder),
            created_at=datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime, UTC),
        )
    except FileNotFoundError:
        return None
