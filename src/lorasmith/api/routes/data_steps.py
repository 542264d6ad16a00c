"""Datasets: check again, write in another format."""

from __future__ import annotations

import shutil
from typing import Annotated

from fastapi import APIRouter, Path, Response
from fastapi.responses import FileResponse

from lorasmith.api import datasets
from lorasmith.api.contents import FILE
from lorasmith.api.deps import CurrentWorkbench
from lorasmith.api.idempotency import IdempotentRoute
from lorasmith.api.problems import without_paths
from lorasmith.api.routes.data import DatasetId
from lorasmith.errors import NotFound
from lorasmith.files import new_id, read_json, write_json
from lorasmith.schemas.api_data_steps import (
    SHOWN_FINDINGS,
    Conversion,
    ConversionRequest,
    ValidationRequest,
    ValidationResource,
)
from lorasmith.schemas.data import DataPreparationSpec
from lorasmith.schemas.jobs import now
from lorasmith.schemas.validation import RowFinding
from lorasmith.services.data_validation import validate_data
from lorasmith.services.data_writing import convert_rows
from lorasmith.services.names import check_model_name
from lorasmith.services.specs import parse_spec
from lorasmith.services.workbench import Workbench

PREFIX = "/api/v1/finetune"
STATE = "conversion.json"
router = APIRouter(prefix=PREFIX, tags=["datasets"], route_class=IdempotentRoute)

ConversionId = Annotated[str, Path(description="Id of a conversion.", pattern=r"^conversion_[0-9A-Z]{26}$")]


@router.post("/datasets/{dataset_id}/validate")
def validate_dataset(
    workbench: CurrentWorkbench, dataset_id: DatasetId, asked: ValidationRequest
) -> ValidationResource:
    """Hold a dataset's files against their checksums and check its rows again"""
    if asked.tokenizer is not None:
        check_model_name(workbench, asked.tokenizer)
    dataset = datasets.require_ready(workbench, dataset_id)
    spec = parse_spec(DataPreparationSpec, asked.model_dump())
    shown: list[RowFinding] = []

    def note(finding: RowFinding) -> None:
        if len(shown) < SHOWN_FINDINGS:
            shown.append(finding)

    with datasets.reading(workbench, dataset):
        found = validate_data(workbench, dataset.id, spec, note)
    return ValidationResource(
        dataset_id=dataset.id,
        passes=found.passes,
        rows=found.rows,
        fates=found.fates,
        counts=found.counts,
        findings=shown,
        validation_errors=[] if found.error is None else [without_paths(found.error, workbench.home)],
        hint=None if found.hint is None else without_paths(found.hint, workbench.home),
    )


@router.post("/datasets/convert", status_code=201)
def convert_dataset(workbench: CurrentWorkbench, asked: ConversionRequest, response: Response) -> Conversion:
    """Write a dataset's rows in another format, as a file to fetch"""
    dataset = datasets.require_ready(workbench, asked.dataset_id)
    conversion_id = new_id("conversion")
    folder = workbench.path(f"exports/{conversion_id}")
    folder.mkdir(parents=True)
    output = folder / f"{dataset.plain_name}-{asked.format}.{asked.file_type}"
    try:
        with datasets.reading(workbench, dataset):
            done = convert_rows(workbench, dataset.id, asked.format, output, leave_out=asked.leave_out)
        made = Conversion(
            id=conversion_id,
            dataset_id=dataset.id,
            format=asked.format,
            file_path=f"exports/{conversion_id}/{output.name}",
            size_bytes=output.stat().st_size,
            written=done.written,
            left_out=dict(done.left_out),
            lost=dict(done.lost),
            created_at=now(),
        )
        write_json(folder / STATE, made.model_dump(mode="json"))
    except BaseException:
        shutil.rmtree(folder)
        raise
    response.headers["Location"] = f"{PREFIX}/conversions/{conversion_id}"
    return made


@router.get("/conversions/{conversion_id}")
def get_conversion(workbench: CurrentWorkbench, conversion_id: ConversionId) -> Conversion:
    """Show what a conversion wrote"""
    return stored_conversion(workbench, conversion_id)


@router.get("/conversions/{conversion_id}/file", response_class=FileResponse, responses=FILE)
def get_conversion_file(workbench: CurrentWorkbench, conversion_id: ConversionId) -> FileResponse:
    """Send the file of a conversion"""
    path = workbench.path(stored_conversion(workbench, conversion_id).file_path)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


@router.delete("/conversions/{conversion_id}", status_code=204)
def delete_conversion(workbench: CurrentWorkbench, conversion_id: ConversionId) -> None:
    """Remove the file of a conversion"""
    stored_conversion(workbench, conversion_id)
    shutil.rmtree(workbench.path(f"exports/{conversion_id}"), ignore_errors=True)


def stored_conversion(workbench: Workbench, conversion_id: str) -> Conversion:
    path = workbench.path(f"exports/{conversion_id}") / STATE
    if not path.is_file():
        raise NotFound(f"no conversion {conversion_id!r}", hint=f"POST {PREFIX}/datasets/convert makes one")
    return Conversion.model_validate(read_json(path))
