"""Versions of a dataset: make one, go back to one, say where one comes from, see whether it comes out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Response
from pydantic import ValidationError

from lorasmith.api import datasets
from lorasmith.api.deps import CurrentWorkbench
from lorasmith.api.etags import CHANGING, IfMatch, check_match, tag
from lorasmith.api.idempotency import IdempotentRoute
from lorasmith.api.problems import without_paths
from lorasmith.api.routes.data import DatasetId
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.api_data import DatasetResource
from lorasmith.schemas.api_data_versions import (
    DedupRequest,
    Lineage,
    LineageStep,
    ReplayResource,
    SplitRequest,
)
from lorasmith.services.data_redeciding import Redecision, dedup, split
from lorasmith.services.data_replay import replay
from lorasmith.services.data_versions import restore_version, versions_of
from lorasmith.services.uploads import NAMES, check_name_is_free
from lorasmith.services.workbench import Workbench

PREFIX = "/api/v1/finetune/datasets"
MADE: dict[int | str, dict[str, Any]] = {200: {"model": DatasetResource, "description": "Nothing changed"}}
router = APIRouter(prefix=PREFIX, tags=["datasets"], route_class=IdempotentRoute)


@router.post("/{dataset_id}/split", status_code=201, responses=MADE)
def split_dataset(
    workbench: CurrentWorkbench, dataset_id: DatasetId, asked: SplitRequest, response: Response
) -> DatasetResource:
    """Assign rows to train, val and test anew, as a new version or under a new name; 200 where nothing changes"""
    changes = asked.model_dump(exclude_unset=True, exclude={"name"})
    missing = [field for field, value in changes.items() if value is None and field != "stratify"]
    if missing or not changes:
        raise InvalidSpec(
            f"{missing[0]} is null" if missing else "say what is to change: split, salt, exact or stratify"
        )
    if asked.exact and asked.stratify:
        raise InvalidSpec("exact cuts all rows and stratify each label: give one of them")
    return version_made(
        workbench, dataset_id, asked.name, response, lambda one: split(workbench, one, changes, new_name=asked.name)
    )


@router.post("/{dataset_id}/dedup", status_code=201, responses=MADE)
def dedup_dataset(
    workbench: CurrentWorkbench, dataset_id: DatasetId, asked: DedupRequest, response: Response
) -> DatasetResource:
    """Take near duplicates out, or bring them back, as a new version or under a new name; 200 where nothing changes"""
    return version_made(
        workbench,
        dataset_id,
        asked.name,
        response,
        lambda one: dedup(workbench, one, asked.threshold, new_name=asked.name),
    )


def version_made(
    workbench: Workbench, dataset_id: str, name: str | None, response: Response, make: Callable[[str], Redecision]
) -> DatasetResource:
    """What `make` gives for the id of the dataset; `name` is that of a new one."""
    dataset = datasets.require_ready(workbench, dataset_id)
    with NAMES:
        if name is not None:
            check_name_is_free(workbench, name)
        try:
            done = make(dataset.id)
        except ValidationError as error:
            raise InvalidSpec(
                "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
            ) from None
    response.headers["Location"] = f"{PREFIX}/{done.after.id}"
    response.status_code = 200 if done.after.id == done.before.id else 201
    return datasets.show(workbench, done.after.id)


@router.post("/{dataset_id}/restore")
def restore_dataset(
    workbench: CurrentWorkbench, dataset_id: DatasetId, response: Response, if_match: IfMatch = None
) -> DatasetResource:
    """Point the name of a dataset at this version again; If-Match holds the version that it points at now"""
    with CHANGING, NAMES:
        dataset = datasets.require_ready(workbench, dataset_id)
        check_match(datasets.show(workbench, dataset.plain_name), if_match, required=False)
        restored = restore_version(workbench, dataset.id)
    shown = datasets.show(workbench, restored.id)
    tag(response, shown)
    return shown


@router.get("/{dataset_id}/lineage")
def dataset_lineage(workbench: CurrentWorkbench, dataset_id: DatasetId) -> Lineage:
    """Say which steps the dataset was made by, from its source on"""
    dataset = datasets.require_ready(workbench, dataset_id)
    steps = [
        LineageStep(
            operation=step.operation,
            options=shown_options(workbench, step.spec),
            inputs=[one.model_copy(update={"name": shown_text(workbench, one.name)}) for one in step.inputs],
            sha256=step.sha256,
            lorasmith=step.lorasmith,
            created_at=step.created_at,
        )
        for step in dataset.lineage
    ]
    versions = [one.reference for one in versions_of(workbench, dataset.plain_name)]
    return Lineage(dataset_id=dataset.id, version=dataset.reference, steps=steps, versions=versions)


@router.post("/{dataset_id}/replay")
def replay_dataset(workbench: CurrentWorkbench, dataset_id: DatasetId) -> ReplayResource:
    """Run the steps of a dataset again from its source and compare the digests"""
    dataset = datasets.require_ready(workbench, dataset_id)
    with datasets.reading(workbench, dataset):
        done = replay(workbench, dataset.id)
    return ReplayResource(dataset_id=dataset.id, equal=done.equal, steps=done.steps)


def shown_text(workbench: Workbench, text: str) -> str:
    return Path(text).name if Path(text).is_absolute() else without_paths(text, workbench.home)


def shown_options(workbench: Workbench, value: Any) -> Any:
    """The options without the folders of this machine."""
    if isinstance(value, dict):
        return {key: shown_options(workbench, one) for key, one in value.items()}
    if isinstance(value, list):
        return [shown_options(workbench, one) for one in value]
    return shown_text(workbench, value) if isinstance(value, str) else value
