"""The chain of a dataset run again from its source, to see whether it still gives the same digests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.errors import InvalidData, NotFound
from lorasmith.files import disk_errors, scratch_folder
from lorasmith.schemas.data import DataImportSpec, Dataset
from lorasmith.schemas.data_lineage import DataStep, DecontaminationSpec, Replay, ReplayedStep
from lorasmith.services.data_checks import ContextCheck
from lorasmith.services.data_curation import SEARCH, Curation
from lorasmith.services.data_decision import decide_rows
from lorasmith.services.data_import import open_context
from lorasmith.services.data_parts import content_digest
from lorasmith.services.data_progress import Report, silent
from lorasmith.services.data_reading import Source
from lorasmith.services.data_redeciding import rows_of_version, spec_with
from lorasmith.services.data_versions import require_version, source_step

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy

KNOWN = ("dedup", "split", "decontaminate", "augment")


def replay(workbench: Workbench, name: str, *, source: Path | None = None, report: Report = silent) -> Replay:
    """Run every step again, in a folder that is removed afterwards, and compare the digests; nothing is stored.

    `source` is where the source lies now, if it was moved. Raises `NotFound` when it is not there, `InvalidData` for a
    step of another stage, which cannot be run again.
    """
    dataset = require_version(workbench, name)
    first = source_step(dataset)
    unknown = next((step.operation for step in dataset.lineage[1:] if step.operation not in KNOWN), None)
    if unknown is not None:
        raise InvalidData(
            f"the dataset {dataset.name!r} was made by a step that does not run again by itself: {unknown}",
            hint=f"lorasmith data lineage {dataset.name} names the version before it, which may be replayed",
        )
    path = source or Path(first.inputs[0].name)
    if Path(first.inputs[0].name).is_absolute() and not path.exists():
        raise NotFound(
            f"the source of {dataset.name!r} is not there: {path}", hint="name the place where it is now: --source PATH"
        )
    home = workbench.path("datasets")
    with disk_errors(home), scratch_folder(home) as scratch:
        steps = replayed_steps(workbench, dataset, path, scratch, report)
    return Replay(dataset=dataset.name, sha256=dataset.sha256, equal=all(step.equal for step in steps), steps=steps)


def replayed_steps(
    workbench: Workbench, dataset: Dataset, path: Path, scratch: Path, report: Report
) -> list[ReplayedStep]:
    first = dataset.lineage[0]
    spec = DataImportSpec.model_validate(first.spec)
    source = Source.open(path, spec.encoding)
    changed_source = changed_digest(first, source.digest())
    context = open_context(workbench, spec.tokenizer) if spec.tokenizer else None
    read = imported(scratch / "0", source, spec, report, context)
    steps = [compared(first, content_digest(read.folder), changed_source)]
    for number, step in enumerate(dataset.lineage[1:], start=1):
        place, note = scratch / f"{number}", None
        changed_input = None if steps[-1].equal else "what it started from is another"
        if step.operation == "augment":
            from lorasmith.services.augmentation_replay import reviewed_rows  # it imports numpy

            rows = reviewed_rows(workbench, step, read.folder, place)
            changed_input, note = changed_input or rows.changed, rows.note
            read = imported(place, Source.open(rows.path, None), rows.spec, report)
        else:
            leaks: Mapping[int, str] = {}
            if step.operation == "decontaminate":
                from lorasmith.services.data_decontamination import changed_benchmark, leaking_rows  # it imports numpy

                changed_input = changed_input or changed_benchmark(workbench, step.inputs)
                leaks = leaking_rows(workbench, read.folder, DecontaminationSpec.model_validate(step.spec))
            read = decided(place, read, step, leaks, report)
        steps.append(compared(step, content_digest(read.folder), changed_input, note))
    return steps


@dataclass(frozen=True)
class Reached:
    """A version of the chain: its folder, the options and statistics behind it, and the search index of its rows."""

    folder: Path
    spec: DataImportSpec
    statistics: dict[str, Any]
    search: Path


def imported(
    place: Path, source: Source, spec: DataImportSpec, report: Report, context: ContextCheck | None = None
) -> Reached:
    place.mkdir(exist_ok=True)
    with Curation(place, source, spec, context=context) as work:
        work.read(report)
        folder = place / "version"
        folder.mkdir()
        return Reached(folder, spec, work.write(folder, report), place / SEARCH)


def decided(folder: Path, before: Reached, step: DataStep, leaks: Mapping[int, str], report: Report) -> Reached:
    folder.mkdir()
    spec = spec_with(before.spec, step.operation, step.spec)
    with rows_of_version(before.folder, spec, before.statistics, leaks) as read:
        decide_rows(folder, read, spec, before.search, report)
    return Reached(folder, spec, before.statistics, before.search)


def changed_digest(step: DataStep, sha256: str) -> str | None:
    recorded = step.inputs[0].sha256
    return None if sha256 == recorded else f"the source changed: its sha256 was {recorded}, now it is {sha256}"


def compared(step: DataStep, sha256: str, changed_input: str | None, note: str | None = None) -> ReplayedStep:
    """Also of another source the outcome may be equal, as when rows were added that are rejected."""
    equal = sha256 == step.sha256
    present = version("lorasmith")
    other_program = f"the same input gave something else: it was made by lorasmith {step.lorasmith}, this is {present}"
    return ReplayedStep(
        operation=step.operation,
        recorded=step.sha256,
        replayed=sha256,
        equal=equal,
        difference=changed_input or (None if equal else other_program),
        note=note,
    )
