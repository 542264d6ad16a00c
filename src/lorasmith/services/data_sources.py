"""What `--data` may name: a stored dataset, a built-in one, or a file, which is imported on the way."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from lorasmith.errors import InvalidData, NotFound, closest
from lorasmith.files import sha256_file
from lorasmith.schemas.data import DataImportSpec, Dataset
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_versions import current_versions, find_version, require_version, versions_of
from lorasmith.services.workbench import Workbench
from lorasmith.starter.location import DATASETS, starter_dataset

BUILT_IN = threading.Lock()  # two requests that name one at once wait for each other's import


def find_dataset(workbench: Workbench, name: str) -> Dataset:
    """The dataset, imported now if `name` is a built-in one or a file that is not stored yet.

    Raises `InvalidData` for one that holds no answers to train on, but preferences between answers.
    """
    dataset = named_dataset(workbench, name)
    if dataset.kind != "sft":
        what = {"preference": "pairs of a chosen and a rejected answer", "kto": "answers marked as wanted or not"}
        raise InvalidData(
            f"the dataset {dataset.name!r} holds {what[dataset.kind]} (format {dataset.format}), expected answers to "
            "train on: training on it as it stands would teach the unwanted answers too",
            hint="preference training is not there yet; import the wanted answers alone as chat or chatml rows",
        )
    return dataset


def named_dataset(workbench: Workbench, name: str) -> Dataset:
    stored = find_version(workbench, name)
    if stored is not None:
        return stored
    if name in DATASETS:
        with BUILT_IN:
            spec = DataImportSpec(name=name)
            return find_version(workbench, name) or import_dataset(workbench, starter_dataset(name), spec)
    path = Path(name).expanduser()
    if path.is_file():
        return import_file(workbench, path.resolve())
    if "@" in name and versions_of(workbench, name.partition("@")[0]):
        require_version(workbench, name)
    raise neither_dataset_nor_file(workbench, name)


def file_named(workbench: Workbench, name: str) -> Path | None:
    """The file or folder of that path, where no dataset has the name."""
    path = Path(name).expanduser()
    return path if find_version(workbench, name) is None and name not in DATASETS and path.exists() else None


def neither_dataset_nor_file(workbench: Workbench, name: str) -> NotFound:
    near = closest(name, {*(one.name for one in current_versions(workbench)), *DATASETS})
    return NotFound(
        f"no dataset and no file {name!r}" + (f"; did you mean {near!r}?" if near else ""),
        hint="lorasmith data import FILE --name NAME, or one of the built-in: " + ", ".join(DATASETS),
    )


def import_file(workbench: Workbench, path: Path) -> Dataset:
    """The import of that file, whatever its name, or a new one named after the file and its folder."""
    digest = sha256_file(path)
    for dataset in workbench.datasets.list():
        if dataset.source_sha256 == digest and len(dataset.lineage) == 1:
            return dataset
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{path.parent.name}-{path.name.split('.')[0]}").strip("-.")[:50]
    if name in workbench.datasets.names():
        name = f"{name}-{digest[:8]}"
    return import_dataset(workbench, path, DataImportSpec(name=name))
