"""Adapters: list, read, remove, export."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import FileResponse

from lorasmith.api import adapters as shown
from lorasmith.api.contents import FILE
from lorasmith.api.deps import CurrentWorkbench
from lorasmith.api.etags import CHANGING, IfMatch, check_match, tag
from lorasmith.api.idempotency import IdempotentRoute
from lorasmith.api.paging import Cursor, Limit, page_of
from lorasmith.errors import Conflict, NotFound
from lorasmith.schemas.adapters import ExportResult, ExportSpec
from lorasmith.schemas.api import Page
from lorasmith.schemas.api_adapters import AdapterResource, ExportRequest, ExportResource
from lorasmith.schemas.jobs import Job, JobKind, JobStatus
from lorasmith.services.adapters import remove_adapter
from lorasmith.services.adapters_export import queue_export
from lorasmith.services.jobs import show_job

router = APIRouter(prefix="/api/v1/finetune", tags=["adapters"], route_class=IdempotentRoute)

Name = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
AdapterId = Annotated[str, Path(description="Id or name of an adapter.", pattern=Name)]
ExportId = Annotated[str, Path(description="Id of an export.", pattern=r"^job_[0-9A-Z]{26}$")]


@router.get("/adapters")
def list_adapters(
    workbench: CurrentWorkbench,
    limit: Limit = 50,
    cursor: Cursor = None,
    name: Annotated[str | None, Query(pattern=Name)] = None,
    base_model: Annotated[str | None, Query(max_length=200)] = None,
    dataset: Annotated[str | None, Query(max_length=200)] = None,
) -> Page[AdapterResource]:
    """List adapters, the newest first"""
    asked = {"name": name, "base_model": base_model, "dataset": dataset}
    where = {field: value for field, value in asked.items() if value is not None}
    exports = shown.completed_exports(workbench)
    rows = workbench.adapters.page(limit + 1, cursor, where)
    found = [shown.adapter_resource(workbench, adapter, exports) for adapter in rows]
    return page_of(found, limit, lambda one: one.id)


@router.get("/adapters/{adapter_id}")
def get_adapter(workbench: CurrentWorkbench, adapter_id: AdapterId, response: Response) -> AdapterResource:
    """Show an adapter"""
    adapter = workbench.adapters.require(adapter_id)
    found = shown.adapter_resource(workbench, adapter, shown.completed_exports(workbench))
    tag(response, found)
    return found


@router.delete("/adapters/{adapter_id}", status_code=204)
def delete_adapter(workbench: CurrentWorkbench, adapter_id: AdapterId, if_match: IfMatch = None) -> None:
    """Remove an adapter with its files; what was exported of it stays"""
    with CHANGING:
        adapter = workbench.adapters.require(adapter_id)
        seen = shown.adapter_resource(workbench, adapter, shown.completed_exports(workbench))
        check_match(seen, if_match, required=False)
        remove_adapter(workbench, adapter.id)


@router.post("/adapters/{adapter_id}/export", status_code=202)
def export_adapter(
    workbench: CurrentWorkbench, adapter_id: AdapterId, asked: ExportRequest, response: Response
) -> ExportResource:
    """Write an adapter merged into its base, as a GGUF file or a model folder"""
    spec = ExportSpec(adapter=adapter_id, kind=asked.format, quantization=asked.quantization)
    job = queue_export(workbench, spec)
    response.headers["Location"] = f"/api/v1/finetune/exports/{job.id}"
    return shown.export_resource(workbench, job)


@router.get("/exports")
def list_exports(
    workbench: CurrentWorkbench, limit: Limit = 50, cursor: Cursor = None, status: JobStatus | None = None
) -> Page[ExportResource]:
    """List exports, the newest first"""
    statuses = None if status is None else {status}
    jobs = workbench.jobs.newest(limit=limit + 1, after=cursor, kind=JobKind.EXPORT, statuses=statuses)
    return page_of([shown.export_resource(workbench, job) for job in jobs], limit, lambda one: one.id)


@router.get("/exports/{export_id}")
def get_export(workbench: CurrentWorkbench, export_id: ExportId) -> ExportResource:
    """Show how far an export is and what came of it"""
    return shown.export_resource(workbench, export_job(workbench, export_id))


@router.get("/exports/{export_id}/file", response_class=FileResponse, responses=FILE)
def get_export_file(workbench: CurrentWorkbench, export_id: ExportId) -> FileResponse:
    """Send the GGUF file of a completed export"""
    job = export_job(workbench, export_id)
    if job.result is None:
        raise Conflict(f"the export {job.id} is {job.status}", hint="its file is there once it is completed")
    result = ExportResult.model_validate(job.result)
    path = FilePath(result.path)
    if result.kind != "gguf":
        raise Conflict(f"the export {job.id} is a folder", hint="export it as gguf to get one file")
    if not path.is_file() or not path.resolve().is_relative_to(workbench.home):
        raise NotFound(f"the file of the export {job.id} is not in the home folder")
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


def export_job(workbench: CurrentWorkbench, export_id: str) -> Job:
    job = show_job(workbench, export_id)
    if job.kind is not JobKind.EXPORT:
        raise NotFound(f"the job {export_id} is no export but of kind {job.kind}")
    return job
