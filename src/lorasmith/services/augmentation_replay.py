"""A review applied again: its rows from those of the dataset it read, and the accepted texts as they are recorded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.errors import NotFound
from lorasmith.files import sha256_file
from lorasmith.schemas.augmentation import AugmentationMethod
from lorasmith.schemas.data import DataImportSpec, Example, Part
from lorasmith.schemas.data_lineage import AppliedReviewSpec, DataStep
from lorasmith.services.augmentation_review import row_line, rows_of_source

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy


@dataclass(frozen=True)
class ReviewedRows:
    """The rows that the import reads. `changed` says how they are others than those recorded."""

    path: Path
    spec: DataImportSpec
    note: str
    changed: str | None


def reviewed_rows(workbench: Workbench, step: DataStep, source: Path, folder: Path) -> ReviewedRows:
    """Write the rows of the version in `source` and, behind them, what was accepted. No teacher is asked.

    Raises `NotFound` when the review is gone: nothing can give the same answers again.
    """
    spec = AppliedReviewSpec.model_validate(step.spec)
    recorded = next(one for one in step.inputs if one.kind == "review")
    path = workbench.path(recorded.name)
    if not path.is_file():
        raise NotFound(
            f"the accepted texts of {spec.job} are not there: {path}",
            hint="they are not asked for again, since a teacher answers differently each time; put the file back",
        )
    with path.open(encoding="utf-8", newline="\n") as lines:
        accepted = list(lines)[-spec.accepted :]
    folder.mkdir()
    again = folder / path.name
    with again.open("w", encoding="utf-8", newline="\n") as file:
        if spec.method != AugmentationMethod.NEGATIVE:  # pairs stand alone
            file.writelines(map(row_line, rows_of_source(lambda part: examples_in(source, part))))
        file.writelines(accepted)
    sha256 = sha256_file(path)
    changed = None
    if sha256 != recorded.sha256:
        changed = f"the accepted texts changed: their sha256 was {recorded.sha256}, now it is {sha256}"
    elif sha256_file(again) != recorded.sha256:
        changed = "the rows that the texts were added to are others"
    count = f"{spec.accepted} accepted text{'s' * (spec.accepted != 1)}"
    note = f"{count} of {spec.teacher} are taken as recorded in {recorded.name}; no teacher is asked again"
    return ReviewedRows(again, DataImportSpec.model_validate(spec.imported), note, changed)


def examples_in(folder: Path, part: Part) -> Iterator[Example]:
    with (folder / f"{part}.jsonl").open(encoding="utf-8", newline="\n") as lines:
        yield from map(Example.model_validate_json, lines)
