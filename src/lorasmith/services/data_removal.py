"""Removing datasets, and who uses them: jobs, adapters, evaluations and the datasets that were derived from them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.errors import Conflict
from lorasmith.files import read_json_if_there, remove_folder
from lorasmith.jobs.folder import ORDER
from lorasmith.schemas.data import Dataset
from lorasmith.schemas.data_lineage import User
from lorasmith.services.data import tokens_folder
from lorasmith.services.data_versions import require_version, versions_of

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy

PASSPORT = "passport.json"
SHOWN_USERS = 5


def versions_to_remove(workbench: Workbench, name: str) -> list[Dataset]:
    """All versions of a name, oldest first; an id or `NAME@digits` means that version alone."""
    dataset = require_version(workbench, name)
    return versions_of(workbench, name) if name == dataset.plain_name else [dataset]


def remove_dataset(workbench: Workbench, name: str, *, force: bool = False) -> list[Dataset]:
    """Remove the rows, then the folders: a reader never meets a row without its files.

    Raises `Conflict` with who uses them, unless `force`. Where other versions stay, the name points at the newest.
    """
    removed = versions_to_remove(workbench, name)
    users = users_of(workbench, removed)
    if users and not force:
        shown = ", ".join(f"{user.kind} {user.name}" for user in users[:SHOWN_USERS])
        more = f" and {len(users) - SHOWN_USERS} more" if len(users) > SHOWN_USERS else ""
        raise Conflict(
            f"the dataset {name!r} is used by {shown}{more}",
            hint="--force removes it all the same; what it was used for can then not be made again",
        )
    for dataset in removed:
        workbench.datasets.remove(dataset.id)
    plain_name = removed[0].plain_name
    left = versions_of(workbench, plain_name)
    if left and all(one.name != plain_name for one in left):
        workbench.datasets.save(left[-1].model_copy(update={"name": plain_name}))
    for dataset in removed:
        uploaded = workbench.path(f"uploads/{dataset.id}")
        for folder in (workbench.path(dataset.folder), tokens_folder(workbench, dataset.id), uploaded):
            remove_folder(folder)
    return removed


def users_of(workbench: Workbench, datasets: list[Dataset]) -> list[User]:
    """Those outside of the given versions, each once."""
    ids = {dataset.id for dataset in datasets}
    return [
        *jobs_with(workbench, ids),
        *adapters_with(workbench, ids),
        *(
            User(kind="evaluation", name=one.name, id=one.id)
            for one in workbench.evaluations.list()
            if one.dataset_id in ids
        ),
        *derived_from(workbench, ids),
    ]


def jobs_with(workbench: Workbench, ids: set[str]) -> Iterator[User]:
    """What a job reads stands in its order, by id or by path."""
    for job in workbench.jobs.list():
        inputs = json.dumps(stored(workbench.path(job.folder) / ORDER).get("inputs"))
        if any(one in inputs for one in ids):
            yield User(kind="job", name=job.name, id=job.id)


def adapters_with(workbench: Workbench, ids: set[str]) -> Iterator[User]:
    """What an adapter was trained on stands in its passport, also in that of an adapter from elsewhere."""
    for adapter in workbench.adapters.list():
        trained_on = stored(workbench.path(adapter.folder) / PASSPORT).get("dataset") or {}
        if adapter.dataset_id in ids or trained_on.get("id") in ids:
            yield User(kind="adapter", name=adapter.name, id=adapter.id)


def derived_from(workbench: Workbench, ids: set[str]) -> Iterator[User]:
    for dataset in workbench.datasets.list():
        inputs = {one.id for step in dataset.lineage for one in step.inputs}
        if dataset.id not in ids and inputs & ids:
            yield User(kind="dataset", name=dataset.reference, id=dataset.id)


def stored(path: Path) -> dict[str, Any]:
    """What a JSON file holds; nothing where there is none, as of an adapter that is removed meanwhile."""
    return read_json_if_there(path) or {}
