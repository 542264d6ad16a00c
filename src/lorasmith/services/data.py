"""Datasets of a workbench: import a file, find, preview, explain and remove."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from lorasmith.errors import Conflict, NotFound
from lorasmith.files import disk_errors, new_id, sha256_file, staged_folder
from lorasmith.schemas.data import PARTS, DataImportSpec, Dataset, Example, Fate, LedgerLine, Part
from lorasmith.services.data_curation import CuratedData, curate
from lorasmith.services.data_reading import read_text

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy

LEDGER = "ledger.jsonl"


def import_dataset(workbench: Workbench, source: Path, spec: DataImportSpec) -> Dataset:
    """The dataset of a file. The same file under the same name and spec gives the dataset that is there already."""
    read_text(source)  # the clear error of a missing or unreadable file, before its digest is taken
    source_sha256 = sha256_file(source)
    existing = workbench.datasets.get(spec.name)
    if existing is not None:
        return same_or_conflict(existing, source, source_sha256, spec)
    data = curate(source, spec)
    dataset_id = new_id("dataset")
    dataset = Dataset(
        id=dataset_id,
        name=spec.name,
        format=data.detection.format,
        format_reason=data.detection.reason,
        source=str(source.resolve()),
        source_sha256=source_sha256,
        spec=spec,
        sha256=content_digest(data),
        folder=f"datasets/{dataset_id}",
        num_examples=len(data.examples),
        part_sizes=data.part_sizes(),
        fates=data.fates(),
        statistics=data.statistics,
    )
    folder = workbench.path(dataset.folder)
    with staged_folder(folder) as staging:
        for part in PARTS:
            write_lines(staging / f"{part}.jsonl", data.parts[part])
        write_lines(staging / LEDGER, data.ledger)
        (staging / "dataset.json").write_text(dataset.model_dump_json(indent=2) + "\n", encoding="utf-8")
    try:
        return workbench.datasets.add(dataset)
    except BaseException:  # a folder without its row would never be found again
        shutil.rmtree(folder)
        raise


def same_or_conflict(existing: Dataset, source: Path, source_sha256: str, spec: DataImportSpec) -> Dataset:
    if existing.source_sha256 != source_sha256:
        difference = f"it was made from other content than {source} has"
    elif existing.spec != spec:
        difference = f"it was made from {source} with other options"
    else:
        return existing
    raise Conflict(
        f"there is already a dataset {spec.name!r}, and {difference}",
        hint=f"choose another --name, or remove it first: lorasmith data rm {spec.name} --yes",
    )


def content_digest(data: CuratedData) -> str:
    """sha256 over the content of the parts in order; row numbers and groups do not count."""
    digest = hashlib.sha256()
    for part in PARTS:
        for example in data.parts[part]:
            content = example.model_dump(include={"messages", "text"}, exclude_none=True)
            digest.update(json.dumps([part, content], ensure_ascii=False, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def list_datasets(workbench: Workbench) -> list[Dataset]:
    return workbench.datasets.list()


def get_dataset(workbench: Workbench, name_or_id: str) -> Dataset:
    return workbench.datasets.require(name_or_id)


def remove_dataset(workbench: Workbench, name_or_id: str) -> Dataset:
    """Remove the row, then the folder: a reader never meets a row without its files."""
    dataset = get_dataset(workbench, name_or_id)
    workbench.datasets.remove(dataset.id)
    folder = workbench.path(dataset.folder)
    if folder.exists():
        shutil.rmtree(folder)
    return dataset


def part_path(workbench: Workbench, dataset: Dataset, part: Part) -> Path:
    return workbench.path(dataset.folder) / f"{part}.jsonl"


def read_examples(workbench: Workbench, dataset: Dataset, part: Part) -> Iterator[Example]:
    """Every example of a part, in the order of the input rows."""
    return map(Example.model_validate_json, stored_lines(part_path(workbench, dataset, part), dataset))


def preview(workbench: Workbench, name_or_id: str, n: int = 3, part: Part = "train") -> list[Example]:
    """The first `n` examples of a part."""
    return list(islice(read_examples(workbench, get_dataset(workbench, name_or_id), part), n))


def ledger_lines(workbench: Workbench, name_or_id: str, fate: Fate | None = None) -> Iterator[LedgerLine]:
    """One line for each input row, or for those with the given fate."""
    dataset = get_dataset(workbench, name_or_id)
    lines = map(LedgerLine.model_validate_json, stored_lines(workbench.path(dataset.folder) / LEDGER, dataset))
    return (line for line in lines if fate is None or line.fate == fate)


def stored_lines(path: Path, dataset: Dataset) -> Iterator[str]:
    if not path.is_file():
        raise NotFound(
            f"the dataset {dataset.name!r} is damaged: {path} is missing",
            hint=f"lorasmith data rm {dataset.name} --yes, then import {dataset.source} again",
        )

    def lines() -> Iterator[str]:
        with path.open(encoding="utf-8", newline="\n") as handle:
            yield from handle

    return lines()


def write_lines(path: Path, rows: Iterable[BaseModel]) -> None:
    with disk_errors(path), path.open("w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(row.model_dump_json(exclude_none=True) + "\n" for row in rows)
