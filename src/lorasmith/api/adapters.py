"""Adapters and exports as callers see them."""

from __future__ import annotations

from pathlib import Path

from lorasmith.api.problems import without_paths
from lorasmith.files import read_json_if_there
from lorasmith.schemas.adapters import Adapter, ExportResult
from lorasmith.schemas.api_adapters import AdapterResource, ExportResource, LoRAConfigResource
from lorasmith.schemas.jobs import Job, JobKind, JobStatus
from lorasmith.services.workbench import Workbench

EXPORTS_LOOKED_AT = 1000  # newest ones, for what an adapter has been exported as


def shown_model(name: str) -> str:
    """A model that was named by its folder is called by the folder's name."""
    return Path(name).name if name.startswith("/") else name


def below_home(workbench: Workbench, path: str) -> str | None:
    found = Path(path)
    return found.relative_to(workbench.home).as_posix() if found.is_relative_to(workbench.home) else None


def exports_of(workbench: Workbench, adapter: Adapter, exports: list[Job]) -> list[ExportResult]:
    """What has been written of it and is still there, the newest first."""
    results = [
        ExportResult.model_validate(job.result)
        for job in exports
        if job.result is not None and job.spec["adapter"] in (adapter.id, adapter.name)
    ]
    return [result for result in results if Path(result.path).exists()]


def completed_exports(workbench: Workbench) -> list[Job]:
    return workbench.jobs.newest(limit=EXPORTS_LOOKED_AT, kind=JobKind.EXPORT, statuses={JobStatus.COMPLETED})


def adapter_resource(workbench: Workbench, adapter: Adapter, exports: list[Job]) -> AdapterResource:
    written = exports_of(workbench, adapter, exports)
    gguf = next((result.path for result in written if result.kind == "gguf"), None)
    return AdapterResource(
        id=adapter.id,
        name=adapter.name,
        base_model=shown_model(adapter.base_model),
        training_job_id=adapter.training_job_id,
        dataset=adapter.dataset,
        lora_config=lora_config(workbench, adapter),
        file_path=adapter.folder,
        file_size=adapter.size_bytes,
        digest=adapter.digest,
        metrics=adapter.metrics,
        created_at=adapter.created_at,
        is_merged=any(result.kind == "merged" for result in written),
        gguf_path=None if gguf is None else below_home(workbench, gguf),
    )


def lora_config(workbench: Workbench, adapter: Adapter) -> LoRAConfigResource:
    """With the modules by name, which the files say; the run may have asked for a role."""
    asked = adapter.lora_config
    found = read_json_if_there(workbench.path(adapter.folder) / "adapter_config.json")  # None: it is removed meanwhile
    modules = asked["target_modules"] if found is None else found.get("target_modules")
    names = [modules] if isinstance(modules, str) else sorted(modules)
    return LoRAConfigResource(rank=asked["rank"], alpha=asked["alpha"], dropout=asked["dropout"], target_modules=names)


def export_resource(workbench: Workbench, job: Job) -> ExportResource:
    result = None if job.result is None else ExportResult.model_validate(job.result)
    adapter = workbench.adapters.get(job.spec["adapter"])
    return ExportResource(
        id=job.id,
        adapter_id=adapter.id if adapter else None,
        adapter_name=job.name.rpartition(" ")[0],
        format=job.spec["kind"],
        quantization=job.spec["quantization"],
        status=job.status,
        file_path=below_home(workbench, result.path) if result else None,
        size_bytes=result.size_bytes if result else None,
        checks=result.checks if result else {},
        created_at=job.created_at,
        started_at=job.started_at,
        completed_at=job.completed_at,
        error=None if job.reason is None else without_paths(job.reason, workbench.home),
    )
