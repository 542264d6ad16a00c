"""Versions of a dataset: found by name or digest, and made by recorded steps.

A version is its content: the examples and the part of each. The newest one has the plain name, an older one `NAME@` and
the first digits of its digest. A step whose outcome is there already points the name at that version again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.errors import Conflict, InvalidData, InvalidSpec, NotFound, did_you_mean
from lorasmith.files import new_id, staged_folder
from lorasmith.schemas.data import Dataset
from lorasmith.schemas.data_lineage import DataStep, StepInput

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy

FEWEST_DIGITS = 4
DESCRIPTION = "dataset.json"


def find_version(workbench: Workbench, name: str) -> Dataset | None:
    """The version with that name, id, or `NAME@` and first digits of a digest.

    Raises `InvalidSpec` for digits that are too few or fit several versions.
    """
    exact = workbench.datasets.get(name)
    plain, mark, digits = name.partition("@")
    if exact is not None or not mark:
        return exact
    versions = versions_of(workbench, plain)
    if versions and len(digits) < FEWEST_DIGITS:
        raise InvalidSpec(
            f"{name!r} must have at least {FEWEST_DIGITS} digits of a digest behind the @", hint=known_as(versions)
        )
    found = [one for one in versions if one.sha256.startswith(digits.lower())]
    if len(found) > 1:
        raise InvalidSpec(f"{name!r} fits {len(found)} versions", hint=known_as(found))
    return found[0] if found else None


def require_version(workbench: Workbench, name: str) -> Dataset:
    """Like `find_version`, but raises `NotFound` with the versions of that name or the nearest name."""
    found = find_version(workbench, name)
    if found is not None:
        return found
    plain = name.partition("@")[0]
    versions = versions_of(workbench, plain)
    if versions:
        raise NotFound(f"the dataset {plain!r} has no version {name!r}", hint=known_as(versions))
    names = {one.plain_name for one in workbench.datasets.list()}
    raise NotFound(
        f"no dataset {name!r}{did_you_mean(plain, names)}",
        hint=f"known datasets: {', '.join(sorted(names)[:10]) or 'none yet'}",
    )


def versions_of(workbench: Workbench, plain_name: str) -> list[Dataset]:
    """Oldest first; the newest or the one that the name points at again has the plain name."""
    return [one for one in workbench.datasets.list() if one.plain_name == plain_name]


def current_versions(workbench: Workbench) -> list[Dataset]:
    """What each name points at."""
    return [one for one in workbench.datasets.list() if one.name == one.plain_name]


def parents_of(dataset: Dataset) -> list[StepInput]:
    """The versions that its last step read."""
    return [one for step in dataset.lineage[-1:] for one in step.inputs if one.kind == "dataset"]


def known_as(versions: list[Dataset]) -> str:
    return "versions: " + ", ".join(one.reference for one in versions)


def recorded_step(operation: str, spec: dict[str, Any], inputs: list[StepInput], sha256: str) -> DataStep:
    return DataStep(operation=operation, spec=spec, inputs=inputs, sha256=sha256, lorasmith=version("lorasmith"))


def input_of(dataset: Dataset) -> StepInput:
    return StepInput(kind="dataset", name=dataset.plain_name, id=dataset.id, sha256=dataset.sha256)


def store_version(workbench: Workbench, name: str, fill: Callable[[Path, str], Dataset]) -> Dataset:
    """Stage a folder, let `fill` write the version with that id into it, and point `name` at the outcome.

    Content that `name` has a version of is not stored twice: the name points at that version (again), which keeps its
    own lineage.
    """
    dataset_id = new_id("dataset")
    folder = workbench.path(f"datasets/{dataset_id}")
    with staged_folder(folder) as staging:
        dataset = fill(staging, dataset_id)
        (staging / DESCRIPTION).write_text(dataset.model_dump_json(indent=2) + "\n", encoding="utf-8")
    try:
        return point_name_at(workbench, name, dataset)
    finally:
        if workbench.datasets.get(dataset_id) is None:  # a folder without its row would never be found again
            shutil.rmtree(folder)


def point_name_at(workbench: Workbench, name: str, dataset: Dataset) -> Dataset:
    """Store the version, or find the equal one, and give it the plain name in one transaction."""
    versions = versions_of(workbench, name)
    chosen = next((one for one in versions if one.sha256 == dataset.sha256), dataset)
    current = next((one for one in versions if one.name == name), None)
    if current is not None and current.id == chosen.id:
        return current
    chosen = chosen.model_copy(update={"name": name})
    older = [current.model_copy(update={"name": current.reference})] if current else []
    workbench.datasets.save(*older, chosen)
    return chosen


def restore_version(workbench: Workbench, name: str) -> Dataset:
    """Point the plain name at that version again. The version that it pointed at stays."""
    dataset = require_version(workbench, name)
    return point_name_at(workbench, dataset.plain_name, dataset)


def free_or_same_name(workbench: Workbench, name: str, parent: Dataset) -> None:
    """Raise `Conflict` for a new name that is taken by a dataset other than the one that is derived from."""
    taken = workbench.datasets.get(name)
    if taken is not None and taken.plain_name != parent.plain_name:
        raise Conflict(
            f"there is already a dataset {name!r}, which was not derived from {parent.plain_name!r}",
            hint="choose another --name, or leave it out for a new version of the same name",
        )


def source_step(dataset: Dataset) -> DataStep:
    """The import that the version comes from. Raises `InvalidData` for one that records none."""
    if not dataset.lineage or dataset.lineage[0].operation != "import":
        raise InvalidData(
            f"the dataset {dataset.name!r} does not say which import it comes from, so it cannot be decided anew",
            hint=f"import it again: lorasmith data import {dataset.source} --name NAME",
        )
    return dataset.lineage[0]
