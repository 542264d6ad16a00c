"""The chain of a dataset run again from its source, to see whether it still gives the same digests."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.errors import InvalidData, NotFound
from lorasmith.files import disk_errors, scratch_folder
from lorasmith.schemas.data import DataImportSpec, Dataset
from lorasmith.schemas.data_lineage import DataStep, DecontaminationSpec, Replay, ReplayedStep
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

DECISIONS = ("dedup", "split", "decontaminate")


def replay(workbench: Workbench, name: str, *, source: Path | None = None, report: Report = silent) -> Replay:
    """Run every step again, in a folder that is removed afterwards, and compare the digests; nothing is stored.

    `source` is where the source lies now, if it was moved. Raises `NotFound` when it is not there, `InvalidData` for a
    step of another stage, which cannot be run again.
    """
    dataset = require_version(workbench, name)
    first = source_step(dataset)
    unknown = next((step.operation for step in dataset.lineage[1:] if step.operation not in DECISIONS), None)
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
    with Curation(scratch, source, spec, context=context) as work:
        work.read(report)
        before = scratch / "0"
        before.mkdir()
        statistics = work.write(before, report)
    steps = [compared(first, content_digest(before), changed_source)]
    for number, step in enumerate(dataset.lineage[1:], start=1):
        spec = spec_with(spec, step.operation, step.spec)
        after = scratch / f"{number}"
        after.mkdir()
        leaks, changed_input = {}, None if steps[-1].equal else "what it started from is another"
        if step.operation == "decontaminate":
            from lorasmith.services.data_decontamination import changed_benchmark, leaking_rows  # it imports numpy

            changed_input = changed_input or changed_benchmark(workbench, step.inputs)
            leaks = leaking_rows(workbench, before, DecontaminationSpec.model_validate(step.spec))
        with rows_of_version(before, spec, statistics, leaks) as read:
            decide_rows(after, read, spec, scratch / SEARCH, report)
        steps.append(compared(step, content_digest(after), changed_input))
        before = after
    return steps


def changed_digest(step: DataStep, sha256: str) -> str | None:
    recorded = step.inputs[0].sha256
    return None if sha256 == recorded else f"the source changed: its sha256 was {recorded}, now it is {sha256}"


def compared(step: DataStep, sha256: str, changed_input: str | None) -> ReplayedStep:
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
    )
