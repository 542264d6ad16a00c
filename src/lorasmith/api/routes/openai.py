"""OpenAI's files and fine-tuning endpoints: its own clients work against this server unchanged."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from lorasmith.api.contents import FILE
from lorasmith.api.deps import CurrentSettings, CurrentWorkbench
from lorasmith.api.etags import CHANGING
from lorasmith.api.idempotency import IdempotentRoute
from lorasmith.api.openai_views import (
    checkpoint_list,
    event_page,
    file_of,
    job_of,
    own,
    required_job,
    theirs,
)
from lorasmith.api.receiving import received_file
from lorasmith.api.retries import Retries
from lorasmith.api.waiting import wait_until
from lorasmith.errors import InvalidSpec, NotFound
from lorasmith.files import sha256_bytes
from lorasmith.schemas.api_openai import (
    CheckpointList,
    EventList,
    FileDeleted,
    FileList,
    FineTuningJobResource,
    FineTuningRequest,
    Hyperparameters,
    JobList,
    OpenAIFile,
)
from lorasmith.schemas.data import DataImportSpec
from lorasmith.schemas.jobs import Job, JobKind, JobRequest
from lorasmith.schemas.training_presets import PRESETS
from lorasmith.schemas.uploads import DatasetStatus, Upload
from lorasmith.services.data_removal import remove_dataset
from lorasmith.services.in_use import USES
from lorasmith.services.jobs import ask, queue_again
from lorasmith.services.names import check_model_name
from lorasmith.services.training import build_spec, start_training
from lorasmith.services.uploads import NAMES, accept_file, all_uploads, find_upload, remove_upload
from lorasmith.services.workbench import Workbench

router = APIRouter(prefix="/v1", tags=["openai"], route_class=IdempotentRoute)

IMPORT_WAIT = "wait=60"  # its clients start a job right after the upload
PRESET = "balanced"
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "JSON Lines of `messages`."},
                        "purpose": {"type": "string", "enum": ["fine-tune"]},
                    },
                }
            }
        },
    }
}
Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(max_length=80, description="Id of the last item of the page before.")]


def required_file(workbench: Workbench, file_id: str) -> Upload:
    upload = find_upload(workbench, own(file_id, "file-"))
    if upload is None:
        raise NotFound(f"no such file: {file_id!r}")
    return upload


@router.post("/files", openapi_extra=FORM)
async def create_file(workbench: CurrentWorkbench, settings: CurrentSettings, request: Request) -> OpenAIFile:
    """Upload a file of examples; each of its rows is for training"""
    async with received_file(request, workbench, settings) as (form, incoming):
        if form.fields.get("purpose") != "fine-tune":
            raise InvalidSpec(f"purpose must be fine-tune, got {form.fields.get('purpose')!r}")
        spec = DataImportSpec(name=incoming.name.removeprefix(".staging-incoming_").lower(), split=(1.0, 0.0, 0.0))
        upload = await run_in_threadpool(accept_file, workbench, form.file_name or "", spec, incoming, None)
    request.app.state.importer.add(upload.id)
    return await run_in_threadpool(file_of, workbench, upload)


@router.get("/files")
def list_files(
    workbench: CurrentWorkbench,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    after: After = None,
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> FileList:
    """List uploaded files"""
    uploads = sorted(all_uploads(workbench), key=lambda one: one.id, reverse=order == "desc")
    ids = [upload.id for upload in uploads]
    begin = ids.index(own(after, "file-")) + 1 if after and own(after, "file-") in ids else 0
    found = uploads[begin : begin + limit + 1] if purpose in (None, "fine-tune") else []
    files = [file_of(workbench, upload) for upload in found[:limit]]
    return FileList(data=files, has_more=len(found) > limit, **ends(files))


@router.get("/files/{file_id}")
def get_file(workbench: CurrentWorkbench, file_id: str) -> OpenAIFile:
    """Show a file"""
    return file_of(workbench, required_file(workbench, file_id))


@router.get("/files/{file_id}/content", response_class=FileResponse, responses=FILE)
def get_file_content(workbench: CurrentWorkbench, file_id: str) -> FileResponse:
    """Send a file as it came"""
    upload = required_file(workbench, file_id)
    path = workbench.path(upload.content)
    if not path.exists():
        raise NotFound(f"the content of {file_id} is not kept: {upload.problem or upload.status}")
    return FileResponse(path, media_type="application/octet-stream", filename="content" + upload.extension)


@router.delete("/files/{file_id}")
def delete_file(workbench: CurrentWorkbench, file_id: str) -> FileDeleted:
    """Remove a file and its dataset; not while something uses it"""
    with CHANGING, NAMES, USES:
        upload = required_file(workbench, file_id)
        if workbench.datasets.get(upload.id) is not None:
            remove_dataset(workbench, upload.id)
        else:
            remove_upload(workbench, upload)
    return FileDeleted(id=theirs(upload.id))


@router.post("/fine_tuning/jobs")
async def create_fine_tuning_job(
    workbench: CurrentWorkbench,
    asked: FineTuningRequest,
    request: Request,
    response: Response,
    retry_count: Annotated[int, Header(alias="x-stainless-retry-count", ge=0, le=100)] = 0,
) -> FineTuningJobResource:
    """Queue a training run; files that are still being read are waited for"""
    retries: Retries = request.app.state.retries
    digest = sha256_bytes(asked.model_dump_json().encode())
    known = retries.answer(digest) if retry_count else None
    if known is None:
        for file_id in filter(None, (asked.training_file, asked.validation_file)):
            upload = await run_in_threadpool(required_file, workbench, file_id)
            await wait_until(partial(is_read, workbench, upload), IMPORT_WAIT, request, response)
        known = (await run_in_threadpool(queue, workbench, asked)).id
        retries.note(digest, known)
    return await run_in_threadpool(lambda: job_of(workbench, workbench.jobs.require(known)))


def is_read(workbench: Workbench, upload: Upload) -> bool:
    found = find_upload(workbench, upload.id)
    return found is None or found.status is not DatasetStatus.PROCESSING


def queue(workbench: Workbench, asked: FineTuningRequest) -> Job:
    check_model_name(workbench, asked.model)
    files = {"training_file": asked.training_file, "validation_file": asked.validation_file}
    datasets = {what: usable(workbench, file_id, what) for what, file_id in files.items() if file_id}
    chosen = asked.chosen
    fields = {"model": asked.model, "data": datasets["training_file"], "training": training_fields(chosen, asked.seed)}
    if asked.suffix:
        fields["name"] = free_suffix(asked.suffix, datasets["training_file"])
    kept = {"suffix": asked.suffix, "validation_file": asked.validation_file, "metadata": asked.metadata}
    return start_training(
        workbench,
        build_spec(fields, home=workbench.home),
        validation_data=datasets.get("validation_file"),
        asked={**kept, "hyperparameters": chosen.model_dump()},
    )


def usable(workbench: Workbench, file_id: str, what: str) -> str:
    """The dataset of a file. Raises `InvalidSpec` when none came of it."""
    upload = required_file(workbench, file_id)
    if upload.status is not DatasetStatus.READY:
        raise InvalidSpec(f"{what} {file_id} is no dataset: {upload.problem or upload.status}")
    return upload.id


def training_fields(chosen: Hyperparameters, seed: int | None) -> dict[str, Any]:
    fields: dict[str, Any] = {} if seed is None else {"seed": seed}
    if chosen.n_epochs != "auto":
        fields["num_epochs"] = chosen.n_epochs
    if chosen.batch_size != "auto":
        fields |= {"batch_size": chosen.batch_size, "gradient_accumulation_steps": 1}
    if chosen.learning_rate_multiplier != "auto":
        fields["learning_rate"] = PRESETS[PRESET]["training"]["learning_rate"] * chosen.learning_rate_multiplier
    return fields


def free_suffix(suffix: str, dataset_id: str) -> str:
    """A suffix need not be unique, an adapter's name must."""
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', suffix).strip('-.') or 'tuned'}-{dataset_id[-6:].lower()}"


@router.get("/fine_tuning/jobs")
def list_fine_tuning_jobs(
    workbench: CurrentWorkbench, request: Request, limit: Limit = 20, after: After = None
) -> JobList:
    """List training runs, the newest first; `metadata[key]=value` filters"""
    wanted = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in request.query_params.items()
        if re.fullmatch(r"metadata\[[^\]]{1,64}\]", name)
    }
    found: list[Job] = []
    cursor = own(after, "ftjob-") if after else None
    while len(found) <= limit:
        page = workbench.jobs.newest(limit=200, after=cursor, kind=JobKind.TRAINING)
        found += [job for job in page if wanted.items() <= ((job.asked or {}).get("metadata") or {}).items()]
        if len(page) < 200:
            break
        cursor = page[-1].id
    return JobList(data=[job_of(workbench, job) for job in found[:limit]], has_more=len(found) > limit)


@router.get("/fine_tuning/jobs/{job_id}")
def get_fine_tuning_job(workbench: CurrentWorkbench, job_id: str) -> FineTuningJobResource:
    """Show a training run"""
    return job_of(workbench, required_job(workbench, job_id))


@router.post("/fine_tuning/jobs/{job_id}/cancel")
def cancel_fine_tuning_job(workbench: CurrentWorkbench, job_id: str) -> FineTuningJobResource:
    """Stop a run for good"""
    return job_of(workbench, ask(workbench, required_job(workbench, job_id), JobRequest.CANCEL))


@router.post("/fine_tuning/jobs/{job_id}/pause")
def pause_fine_tuning_job(workbench: CurrentWorkbench, job_id: str) -> FineTuningJobResource:
    """Save a run and stop it"""
    return job_of(workbench, ask(workbench, required_job(workbench, job_id), JobRequest.PAUSE))


@router.post("/fine_tuning/jobs/{job_id}/resume")
def resume_fine_tuning_job(workbench: CurrentWorkbench, job_id: str) -> FineTuningJobResource:
    """Queue a stopped run again"""
    return job_of(workbench, queue_again(workbench, required_job(workbench, job_id)))


@router.get("/fine_tuning/jobs/{job_id}/events")
def list_events(workbench: CurrentWorkbench, job_id: str, limit: Limit = 20, after: After = None) -> EventList:
    """List what a run has said, the newest first"""
    job = required_job(workbench, job_id)
    number = after.rpartition("-")[2] if after else ""
    if after and not (number.isascii() and number.isdigit() and len(number) < 16):
        raise InvalidSpec(f"after is no event id: {after!r}")
    events, more = event_page(workbench, job, int(number) if number else None, limit)
    return EventList(data=events, has_more=more)


@router.get("/fine_tuning/jobs/{job_id}/checkpoints")
def list_job_checkpoints(
    workbench: CurrentWorkbench, job_id: str, limit: Limit = 10, after: After = None
) -> CheckpointList:
    """List the checkpoints that a run holds, the newest first"""
    found = checkpoint_list(workbench, required_job(workbench, job_id))
    ids = [one.id for one in found]
    begin = ids.index(after) + 1 if after in ids else 0
    shown = found[begin : begin + limit]
    return CheckpointList(data=shown, has_more=len(found) > begin + limit, **ends(shown))


def ends(items: list[Any]) -> dict[str, str | None]:
    return {"first_id": items[0].id if items else None, "last_id": items[-1].id if items else None}
