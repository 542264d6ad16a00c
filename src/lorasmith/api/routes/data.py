"""Datasets: list, read, describe, remove, look into."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import FileResponse

from lorasmith.api import datasets
from lorasmith.api.contents import FILE
from lorasmith.api.deps import CurrentWorkbench
from lorasmith.api.etags import CHANGING, IfMatch, check_match, tag
from lorasmith.api.paging import Cursor, Limit, page_of
from lorasmith.api.routes.uploads import only_writer
from lorasmith.errors import Conflict, InvalidSpec
from lorasmith.schemas.api import Page
from lorasmith.schemas.api_data import (
    NAME,
    DatasetChange,
    DatasetPreview,
    DatasetResource,
    DatasetStatistics,
    LedgerPage,
)
from lorasmith.schemas.data import DatasetFormat, Fate, FindingName, Part
from lorasmith.schemas.data_lineage import SHOWN_DIGITS
from lorasmith.schemas.uploads import DatasetStatus
from lorasmith.services.data import (
    check_fate,
    describe_dataset,
    ledger_lines,
    ledger_path,
    read_examples,
    require_stored,
)
from lorasmith.services.data_removal import remove_dataset
from lorasmith.services.data_versions import versions_of
from lorasmith.services.in_use import USES, refuse_while_used
from lorasmith.services.uploads import NAMES, check_name_is_free, find_upload, remove_upload

router = APIRouter(prefix="/api/v1/finetune/datasets", tags=["datasets"])

DATASET = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}(@[0-9A-Fa-f]{1,64})?$"
DatasetId = Annotated[str, Path(description="Id or name of a dataset, or `name@digits` of a version.", pattern=DATASET)]


@router.get("")
def list_datasets(
    workbench: CurrentWorkbench,
    limit: Limit = 50,
    cursor: Cursor = None,
    name: Annotated[str | None, Query(pattern=NAME)] = None,
    status: DatasetStatus | None = None,
    format: DatasetFormat | None = None,
    versions: Annotated[bool, Query(description="All versions of each name, not only the present one.")] = False,
) -> Page[DatasetResource]:
    """List datasets, the newest first, with those that are still being uploaded or imported"""
    found = datasets.newest(workbench, limit + 1, cursor, name=name, status=status, format=format, versions=versions)
    return page_of(found, limit, lambda one: one.id)


@router.get("/{dataset_id}")
def get_dataset(workbench: CurrentWorkbench, dataset_id: DatasetId, response: Response) -> DatasetResource:
    """Show a dataset; its ETag goes into If-Match of a change"""
    found = datasets.show(workbench, dataset_id)
    tag(response, found)
    return found


@router.put("/{dataset_id}")
def update_dataset(
    workbench: CurrentWorkbench,
    dataset_id: DatasetId,
    change: DatasetChange,
    response: Response,
    if_match: IfMatch = None,
) -> DatasetResource:
    """Give a dataset another name and description"""
    with CHANGING, NAMES:
        seen = datasets.show(workbench, dataset_id)
        check_match(seen, if_match, required=True)
        if seen.status is not DatasetStatus.READY:
            raise Conflict(f"the dataset {seen.name!r} is {seen.status}", hint="it can be changed once it is ready")
        if change.name != seen.name:
            check_name_is_free(workbench, change.name, but=seen.id)
            if len(versions_of(workbench, seen.name.partition("@")[0])) > 1:
                raise Conflict(f"the dataset {seen.name!r} has several versions under its name, which keep it")
        describe_dataset(workbench, seen.id, change.name, change.description)
    changed = datasets.show(workbench, seen.id)
    tag(response, changed)
    return changed


@router.delete("/{dataset_id}", status_code=204)
def delete_dataset(
    workbench: CurrentWorkbench,
    dataset_id: DatasetId,
    force: Annotated[bool, Query(description="Also one that ended jobs, adapters or versions were made from.")] = False,
    if_match: IfMatch = None,
) -> None:
    """Remove a dataset with its files, by its name all versions; or an upload"""
    with CHANGING, NAMES, only_writer(dataset_id), USES:
        upload = find_upload(workbench, dataset_id)  # before its dataset, which may come of it now
        seen = datasets.show(workbench, dataset_id)
        check_match(seen, if_match, required=False)
        if seen.status is DatasetStatus.READY:
            refuse_while_used(workbench, "dataset", seen.name, {"data": {seen.id, seen.name, seen.version}})
            remove_dataset(workbench, dataset_id, force=force)
        elif upload is not None:
            remove_upload(workbench, upload)


@router.get("/{dataset_id}/preview")
def preview_dataset(
    workbench: CurrentWorkbench,
    dataset_id: DatasetId,
    part: Part = "train",
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
) -> DatasetPreview:
    """Show examples of a part"""
    dataset = datasets.require_ready(workbench, dataset_id)
    with datasets.reading(workbench, dataset):
        examples = list(islice(read_examples(workbench, dataset, part), offset, offset + limit))
    total = dataset.part_sizes.get(part, 0)
    return DatasetPreview(dataset_id=dataset.id, part=part, total=total, offset=offset, examples=examples)


@router.get("/{dataset_id}/statistics")
def dataset_statistics(workbench: CurrentWorkbench, dataset_id: DatasetId) -> DatasetStatistics:
    """Count and measure the examples of a dataset"""
    dataset = datasets.require_ready(workbench, dataset_id)
    return DatasetStatistics(
        dataset_id=dataset.id,
        num_examples=dataset.num_examples,
        total_tokens=datasets.total_tokens(dataset),
        part_sizes=dataset.part_sizes,
        fates=dataset.fates,
        statistics=dataset.statistics,
    )


@router.get("/{dataset_id}/ledger")
def dataset_ledger(
    workbench: CurrentWorkbench,
    dataset_id: DatasetId,
    limit: Limit = 100,
    cursor: Annotated[str | None, Query(description="`next_cursor` of the page before.", max_length=15)] = None,
    fate: Fate | None = None,
    flag: FindingName | None = None,
) -> LedgerPage:
    """Say what became of each input row"""
    check_fate(fate)
    if cursor is not None and not (cursor.isascii() and cursor.isdigit()):
        raise InvalidSpec(f"a cursor of the ledger is a row number, got {cursor!r}")
    dataset = datasets.require_ready(workbench, dataset_id)
    after = int(cursor or 0)
    with datasets.reading(workbench, dataset):
        lines = (line for line in ledger_lines(workbench, dataset.id, fate, flag) if line.row > after)
        found = list(islice(lines, limit + 1))
    shown = found[:limit]
    return LedgerPage(data=shown, next_cursor=str(shown[-1].row) if len(found) > limit else None)


@router.get("/{dataset_id}/ledger/file", response_class=FileResponse, responses=FILE)
def dataset_ledger_file(workbench: CurrentWorkbench, dataset_id: DatasetId) -> FileResponse:
    """Send the whole ledger as JSON Lines"""
    dataset = datasets.require_ready(workbench, dataset_id)
    return FileResponse(
        require_stored(ledger_path(workbench, dataset), dataset),
        media_type="application/octet-stream",
        filename=f"{dataset.plain_name}-{dataset.sha256[:SHOWN_DIGITS]}-ledger.jsonl",
    )
