"""Datasets as callers see them: stored ones and uploads on their way, in one list."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lorasmith.api.problems import without_paths
from lorasmith.errors import InvalidData, NotFound
from lorasmith.schemas.api_data import DatasetResource, UploadResource
from lorasmith.schemas.data import Dataset, DatasetFormat, Fate
from lorasmith.schemas.uploads import DatasetStatus, Upload
from lorasmith.services.data import get_dataset
from lorasmith.services.data_versions import find_version
from lorasmith.services.uploads import find_upload, list_uploads, received_bytes
from lorasmith.services.workbench import Workbench


def of_row(workbench: Workbench, dataset: Dataset) -> DatasetResource:
    upload = find_upload(workbench, dataset.id)
    rejected = dataset.fates.get(Fate.REJECTED, 0)
    rows = sum(dataset.fates.values())
    left_out = f"{rejected} of {rows} rows were left out; the ledger has the reason of each (fate=rejected)"
    return DatasetResource(
        id=dataset.id,
        name=dataset.name,
        description=dataset.description,
        format=dataset.format,
        status=DatasetStatus.READY,
        num_examples=dataset.num_examples,
        total_tokens=total_tokens(dataset),
        version=dataset.reference,
        file_path=dataset.folder,
        created_at=dataset.created_at,
        updated_at=dataset.updated_at or dataset.created_at,
        validation_errors=[left_out] if rejected else [],
        statistics=dataset.statistics,
        part_sizes=dataset.part_sizes,
        fates=dataset.fates,
        file_name=None if upload is None else upload.file_name,
        source_sha256=dataset.source_sha256,
        sha256=dataset.sha256,
    )


def total_tokens(dataset: Dataset) -> int | None:
    tokens = dataset.statistics.get("tokens")
    total = tokens.get("total") if isinstance(tokens, dict) else None
    return total if isinstance(total, int) else None


def of_upload(workbench: Workbench, upload: Upload) -> DatasetResource:
    problem = None if upload.problem is None else without_paths(upload.problem, workbench.home)
    return DatasetResource(
        id=upload.id,
        name=upload.spec.name,
        description=upload.description,
        format=None if upload.spec.format == "auto" else upload.spec.format,
        status=upload.status,
        num_examples=0,
        total_tokens=None,
        file_path=upload.content,
        created_at=upload.created_at,
        updated_at=upload.updated_at,
        validation_errors=None if problem is None else [problem],
        statistics=None,
        part_sizes={},
        fates={},
        file_name=upload.file_name,
        source_sha256=upload.sha256,
    )


def upload_in_parts(workbench: Workbench, upload: Upload) -> UploadResource:
    return UploadResource(
        id=upload.id,
        name=upload.spec.name,
        file_name=upload.file_name,
        size_bytes=upload.size_bytes,
        offset=received_bytes(workbench, upload),
        status=upload.status,
        created_at=upload.created_at,
    )


def show(workbench: Workbench, dataset_id: str) -> DatasetResource:
    """A stored dataset by id or name, or an upload by id. Raises `NotFound`."""
    stored = find_version(workbench, dataset_id)
    if stored is not None:
        return of_row(workbench, stored)
    upload = find_upload(workbench, dataset_id)
    if upload is not None and upload.status is not DatasetStatus.READY:
        return of_upload(workbench, upload)
    return of_row(workbench, get_dataset(workbench, dataset_id))  # raises with the nearest name


def require_ready(workbench: Workbench, dataset_id: str) -> Dataset:
    """Raises `NotFound` also for an upload that is no dataset yet."""
    upload = find_upload(workbench, dataset_id)
    if upload is not None and find_version(workbench, dataset_id) is None:
        raise NotFound(f"the dataset {upload.spec.name!r} is {upload.status}, so it has no rows")
    return get_dataset(workbench, dataset_id)


@contextmanager
def reading(workbench: Workbench, dataset: Dataset) -> Iterator[None]:
    """Its files are read in the block. Raises `NotFound` where the dataset is removed meanwhile."""
    try:
        yield
    except (FileNotFoundError, InvalidData, NotFound):
        if workbench.datasets.get(dataset.id) is None:
            raise NotFound(f"the dataset {dataset.name!r} has been removed meanwhile") from None
        raise


def stored_rows(
    workbench: Workbench, limit: int, before: str | None, where: dict[str, str], name: str | None, versions: bool
) -> list[Dataset]:
    found: list[Dataset] = []
    while len(found) < limit and (rows := workbench.datasets.page(limit, before, where)):
        before = rows[-1].id
        found += [row for row in rows if name in (None, row.plain_name) and (versions or row.name == row.plain_name)]
    return found[:limit]


def newest(
    workbench: Workbench,
    limit: int,
    before: str | None,
    *,
    name: str | None,
    status: DatasetStatus | None,
    format: DatasetFormat | None,
    versions: bool,
) -> list[DatasetResource]:
    """At most `limit`, the newest first, with the asked name, status and format; of a name its present version or all."""
    where = {} if format is None else {"format": format.value}
    ready = status in (None, DatasetStatus.READY)
    waiting = [
        of_upload(workbench, upload)
        for upload in list_uploads(workbench)  # before the stored ones: one that becomes a dataset now is in both
        if (before is None or upload.id < before)
        and name in (None, upload.spec.name)
        and status in (None, upload.status)
        and format in (None, upload.spec.format)
        and workbench.datasets.get(upload.id) is None
    ]
    rows = stored_rows(workbench, limit, before, where, name, versions) if ready else []
    stored = {row.id for row in rows}
    found = [of_row(workbench, row) for row in rows] + [one for one in waiting if one.id not in stored]
    return sorted(found, key=lambda one: one.id, reverse=True)[:limit]
