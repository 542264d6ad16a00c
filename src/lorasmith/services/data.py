"""Datasets of a workbench: find, preview and explain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from lorasmith.errors import Conflict, InvalidSpec, NotFound
from lorasmith.files import disk_errors, folder_size_bytes
from lorasmith.schemas.data import IN_TRAINING, Dataset, Example, Fate, FindingName, LedgerLine, Part
from lorasmith.schemas.jobs import now
from lorasmith.services.data_parts import LEDGER
from lorasmith.services.data_versions import current_versions, require_version, versions_of

TOKENS = "tokens"

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy


def list_datasets(workbench: Workbench) -> list[Dataset]:
    """The version that each name points at, oldest first."""
    return current_versions(workbench)


def get_dataset(workbench: Workbench, name_or_id: str) -> Dataset:
    return require_version(workbench, name_or_id)


def describe_dataset(workbench: Workbench, name_or_id: str, name: str | None, description: str | None) -> Dataset:
    """Give it another name (None: the same), with all its versions, and description (None: none)."""
    dataset = get_dataset(workbench, name_or_id)
    versions = versions_of(workbench, dataset.plain_name)
    if name is not None and name != dataset.plain_name:
        taken = workbench.datasets.get(name)
        if taken is not None:
            raise Conflict(f"there is already a dataset named {name!r}: {taken.id}")
        for one in versions:
            one.name = name + one.name.removeprefix(one.plain_name)
    changed = next(one for one in versions if one.id == dataset.id)
    changed.description, changed.updated_at = description, now()
    workbench.datasets.save(*versions)
    return changed


def tokens_folder(workbench: Workbench, dataset_id: str) -> Path:
    """Where engine processes keep the dataset's tokens."""
    return workbench.path(TOKENS) / dataset_id


def tokens_bytes(workbench: Workbench, dataset_id: str) -> int:
    folder = tokens_folder(workbench, dataset_id)
    return folder_size_bytes(folder) if folder.exists() else 0


def part_path(workbench: Workbench, dataset: Dataset, part: Part) -> Path:
    return workbench.path(dataset.folder) / f"{part}.jsonl"


def read_examples(workbench: Workbench, dataset: Dataset, part: Part) -> Iterator[Example]:
    """Every example of a part, in the order of the input rows."""
    return map(Example.model_validate_json, stored_lines(part_path(workbench, dataset, part), dataset))


def preview(workbench: Workbench, name_or_id: str, n: int = 3, part: Part = "train") -> list[Example]:
    """The first `n` examples of a part."""
    return list(islice(read_examples(workbench, get_dataset(workbench, name_or_id), part), n))


def ledger_lines(
    workbench: Workbench, name_or_id: str, fate: Fate | None = None, flag: FindingName | None = None
) -> Iterator[LedgerLine]:
    """One line for each input row, or for those with the given fate or flag."""
    dataset = get_dataset(workbench, name_or_id)
    lines = map(LedgerLine.model_validate_json, stored_lines(ledger_path(workbench, dataset), dataset))
    return chosen_lines(lines, fate, flag)


def ledger_path(workbench: Workbench, dataset: Dataset) -> Path:
    return workbench.path(dataset.folder) / LEDGER


def check_fate(fate: Fate | None) -> None:
    """Raise for a fate that no row of a dataset has by itself."""
    if fate in IN_TRAINING:
        raise InvalidSpec(
            f"rows are {fate} when a model is trained on them",
            hint="lorasmith data ledger NAME --model M with, as in train, --too-long right; or --job JOB of a run",
        )


def chosen_lines(lines: Iterable[LedgerLine], fate: Fate | None, flag: FindingName | None) -> Iterator[LedgerLine]:
    """Those with the given fate and flag; None: any."""
    return (
        line
        for line in lines
        if fate in (None, line.fate) and (flag is None or any(found.check == flag for found in line.flags or ()))
    )


def save_ledger(lines: Iterable[LedgerLine], path: Path) -> None:
    """Write ledger lines as JSON Lines. The file is whole or absent."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write_lines(temporary, lines)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_stored(path: Path, dataset: Dataset) -> Path:
    if not path.is_file():
        raise NotFound(
            f"the dataset {dataset.name!r} is damaged: {path} is missing",
            hint=f"lorasmith data rm {dataset.name} --yes, then import {dataset.source} again",
        )
    return path


def stored_lines(path: Path, dataset: Dataset) -> Iterator[str]:
    require_stored(path, dataset)

    def lines() -> Iterator[str]:
        with path.open(encoding="utf-8", newline="\n") as handle:
            yield from handle

    return lines()


def write_lines(path: Path, rows: Iterable[BaseModel]) -> None:
    with disk_errors(path), path.open("w", encoding="utf-8", newline="\n") as handle:
        handle.writelines(row.model_dump_json(exclude_none=True) + "\n" for row in rows)
