"""Files that become datasets: in one request, or begun, filled from where it stands and completed, as large ones are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from lorasmith.api import datasets
from lorasmith.api.deps import CurrentSettings, CurrentWorkbench
from lorasmith.api.idempotency import IdempotentRoute, answer_once, key_of
from lorasmith.api.receiving import Target, received_file
from lorasmith.api.waiting import Prefer, wait_until
from lorasmith.errors import Conflict, InvalidSpec, TooLarge
from lorasmith.files import sha256_bytes, sha256_file
from lorasmith.schemas.api_data import DatasetResource, UploadCompletion, UploadRequest, UploadResource
from lorasmith.schemas.data import DataImportSpec
from lorasmith.schemas.uploads import DatasetStatus
from lorasmith.services.specs import parse_spec
from lorasmith.services.uploads import (
    accept_file,
    begin_upload,
    cut_back,
    find_upload,
    finish_upload,
    list_uploads,
    received_bytes,
    remove_upload,
    require_upload,
)
from lorasmith.services.workbench import Workbench

router = APIRouter(prefix="/api/v1/finetune", tags=["uploads"])
parts_router = APIRouter(prefix="/api/v1/finetune/uploads", tags=["uploads"], route_class=IdempotentRoute)

FIELDS = ("name", "description", "format", "options")
FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "name"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "JSON, JSON Lines, CSV or Parquet.",
                        },
                        "name": {
                            "type": "string",
                            "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
                            "example": "support",
                        },
                        "description": {"type": "string", "maxLength": 2000},
                        "format": {"type": "string", "description": "Row format; absent: found from the rows."},
                        "options": {
                            "type": "string",
                            "description": "JSON object of further fields of an import.",
                            "example": '{"split": [0.8, 0.1, 0.1]}',
                        },
                    },
                }
            }
        },
    }
}
UploadId = Annotated[str, Path(description="Id of an upload.", pattern=r"^dataset_[0-9A-Z]{26}$")]
FILLING: set[str] = set()  # uploads into which a request writes now
FILLING_LOCK = threading.Lock()


def import_spec(name: str, format: str | None, options: dict[str, Any]) -> DataImportSpec:
    named = [field for field in ("name", "format") if field in options]
    if named:
        raise InvalidSpec(f"options hold {named[0]!r}, which is a field of its own")
    values = {**options, "name": name} | ({"format": format} if format else {})
    return parse_spec(DataImportSpec, values)


def options_of(fields: dict[str, str]) -> dict[str, Any]:
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise InvalidSpec(f"the form has a field {unknown[0]!r}", hint=f"fields: file, {', '.join(FIELDS)}")
    if not fields.get("name"):
        raise InvalidSpec("the form has no field `name`", hint="it names the new dataset")
    if len(fields.get("description", "")) > 2000:
        raise InvalidSpec("the description is longer than 2000 characters")
    try:
        options = json.loads(fields.get("options") or "{}")
    except ValueError as error:
        raise InvalidSpec(f"the field `options` is not valid JSON: {error}") from None
    if not isinstance(options, dict):
        raise InvalidSpec("the field `options` must be a JSON object")
    return options


@router.post("/datasets", status_code=202, openapi_extra=FORM)
async def upload_dataset(
    workbench: CurrentWorkbench, settings: CurrentSettings, request: Request, response: Response, prefer: Prefer = None
) -> DatasetResource:
    """Upload a file, which is imported as a dataset; its status goes from processing to ready or error"""
    key = key_of(request)
    async with received_file(request, workbench, settings) as (form, incoming):
        spec = import_spec(form.fields.get("name", ""), form.fields.get("format"), options_of(form.fields))
        sha256 = await run_in_threadpool(sha256_file, incoming)

        async def take() -> Response:
            about = form.file_name or "", spec, incoming, form.fields.get("description")
            upload = await run_in_threadpool(accept_file, workbench, *about)
            request.app.state.importer.add(upload.id)
            response.headers["Location"] = f"/api/v1/finetune/datasets/{upload.id}"
            await wait_until(lambda: is_settled(workbench, upload.id), prefer, request, response)
            shown = await run_in_threadpool(datasets.show, workbench, upload.id)
            headers = dict(response.headers)
            return Response(shown.model_dump_json(), 202, headers, media_type="application/json")

        if key is None:
            return await take()  # type: ignore[return-value]  # a response passes through as it is
        said = json.dumps([form.file_name, form.fields, sha256], sort_keys=True)
        return await answer_once(request, key, sha256_bytes(said.encode()), take)  # type: ignore[return-value]


def is_settled(workbench: Workbench, upload_id: str) -> bool:
    """By the upload's own state, which is written last: from then on it can be removed."""
    upload = find_upload(workbench, upload_id)
    return upload is None or upload.status in (DatasetStatus.READY, DatasetStatus.ERROR)


@parts_router.post("", status_code=201)
def create_upload(
    workbench: CurrentWorkbench, settings: CurrentSettings, asked: UploadRequest, response: Response
) -> UploadResource:
    """Begin an upload in parts"""
    if asked.size_bytes > settings.max_upload_bytes:
        raise TooLarge(f"{asked.size_bytes} bytes are more than the limit of {settings.max_upload_bytes} bytes")
    spec = import_spec(asked.name, asked.format, asked.options)
    upload = begin_upload(workbench, asked.file_name, asked.size_bytes, spec, asked.description)
    response.headers["Location"] = f"/api/v1/finetune/uploads/{upload.id}"
    return datasets.upload_in_parts(workbench, upload)


@parts_router.get("")
def list_unfinished_uploads(workbench: CurrentWorkbench) -> list[UploadResource]:
    """List uploads in parts that have not been completed, the oldest first"""
    waiting = [upload for upload in list_uploads(workbench) if upload.status is DatasetStatus.UPLOADING]
    return [datasets.upload_in_parts(workbench, upload) for upload in waiting]


@parts_router.get("/{upload_id}")
def get_upload(workbench: CurrentWorkbench, upload_id: UploadId, response: Response) -> UploadResource:
    """Say how many bytes of an upload have come: the offset to go on from"""
    found = datasets.upload_in_parts(workbench, require_upload(workbench, upload_id))
    response.headers["Upload-Offset"] = str(found.offset)
    return found


BYTES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}


@parts_router.patch("/{upload_id}", openapi_extra=BYTES)
async def add_to_upload(
    workbench: CurrentWorkbench,
    upload_id: UploadId,
    request: Request,
    response: Response,
    upload_offset: Annotated[int, Header(ge=0, le=2**53, description="Where these bytes begin: as many as have come.")],
) -> UploadResource:
    """Append bytes; what arrives before a connection breaks is kept"""
    with only_writer(upload_id):
        upload = await run_in_threadpool(require_upload, workbench, upload_id)
        offset = received_bytes(workbench, upload)
        if upload.status is not DatasetStatus.UPLOADING:
            raise Conflict(f"the upload {upload.id} is {upload.status}")
        if upload_offset != offset:
            raise Conflict(
                f"{offset} bytes have come, and these begin at {upload_offset}", hint=f"Upload-Offset: {offset}"
            )
        assert upload.size_bytes is not None
        target = Target(workbench.path(upload.content), offset, upload.size_bytes, "the announced length")
        try:
            async for piece in request.stream():
                await target.write(piece)
        except ClientDisconnect:
            pass  # the sender asks for the offset and goes on from there
        except TooLarge:
            target.waiting.clear()
            await target.close()
            await run_in_threadpool(cut_back, workbench, upload, offset)
            raise
        await target.close()
    found = await run_in_threadpool(datasets.upload_in_parts, workbench, upload)
    response.headers["Upload-Offset"] = str(found.offset)
    return found


@contextmanager
def only_writer(upload_id: str) -> Iterator[None]:
    """Raises `Conflict` while another request writes into the upload."""
    with FILLING_LOCK:
        if upload_id in FILLING:
            raise Conflict(f"another request writes into the upload {upload_id}", hint="wait for it")
        FILLING.add(upload_id)
    try:
        yield
    finally:
        with FILLING_LOCK:
            FILLING.discard(upload_id)


@parts_router.post("/{upload_id}/complete", status_code=202)
def complete_upload(
    workbench: CurrentWorkbench, upload_id: UploadId, asked: UploadCompletion, request: Request, response: Response
) -> DatasetResource:
    """Import an upload whose bytes are all there"""
    with only_writer(upload_id):
        upload = finish_upload(workbench, require_upload(workbench, upload_id), asked.sha256)
    request.app.state.importer.add(upload.id)
    response.headers["Location"] = f"/api/v1/finetune/datasets/{upload.id}"
    return datasets.show(workbench, upload.id)


@parts_router.delete("/{upload_id}", status_code=204)
def delete_upload(workbench: CurrentWorkbench, upload_id: UploadId) -> None:
    """Give up an upload and remove what has come"""
    with only_writer(upload_id):
        remove_upload(workbench, require_upload(workbench, upload_id))
