"""The label X-ray: how a model would be trained on rows of a dataset, or of a file that is not imported."""

from __future__ import annotations

from pathlib import Path

from lorasmith.errors import InvalidData, NotFound
from lorasmith.files import new_id
from lorasmith.schemas.data import PARTS, DataPreparationSpec, Example, Part
from lorasmith.schemas.jobs import JobKind, JobOrder
from lorasmith.schemas.labels import LabelInputs, LabelReport, LabelSpec
from lorasmith.services.data import read_examples, write_lines
from lorasmith.services.data_curation import curate
from lorasmith.services.data_sources import find_dataset
from lorasmith.services.data_versions import find_version
from lorasmith.services.jobs import Watch
from lorasmith.services.models import resolve_model
from lorasmith.services.previews import preview_folder, run_preview
from lorasmith.services.workbench import Workbench
from lorasmith.starter.location import DATASETS


def show_labels(workbench: Workbench, spec: LabelSpec, watch: Watch) -> LabelReport:
    """Render rows in an engine process, with the model's tokenizer and template; its folder is removed afterwards."""
    model = resolve_model(workbench, spec.model)
    examples = asked_examples(workbench, spec.data, part=spec.part, rows=spec.rows, n=spec.n)
    if not examples:
        raise InvalidData(f"the part {spec.part or 'train'} of {spec.data} is empty", hint="--part, or --row N")
    job_id = new_id("job")
    folder = preview_folder(workbench, job_id)
    inputs = LabelInputs(model_folder=model.location, examples_file=str(folder / "examples.jsonl"))
    order = JobOrder(id=job_id, kind=JobKind.LABELS, spec=spec.model_dump(), inputs=inputs.model_dump())
    folder.mkdir(parents=True)
    write_lines(folder / "examples.jsonl", examples)
    return LabelReport.model_validate(run_preview(folder, order, watch))


def asked_examples(
    workbench: Workbench, data: str, *, part: Part | None, rows: tuple[int, int] | None, n: int
) -> list[Example]:
    """The examples of the rows from first to last, or the first `n` of the part, train if none is named.

    Raises `NotFound` when no example comes from those rows.
    """
    parts = example_parts(workbench, data)
    if rows is None:
        return parts[part or "train"][:n]
    candidates = [example for name in PARTS if part in (None, name) for example in parts[name]]
    chosen = sorted((one for one in candidates if rows[0] <= one.row <= rows[1]), key=lambda example: example.row)
    if not chosen:
        asked = f"row {rows[0]}" if rows[0] == rows[1] else f"rows {rows[0]} to {rows[1]}"
        last = max((example.row for example in candidates), default=0)
        raise NotFound(
            f"no example of {data}{f', part {part},' if part else ''} comes from {asked}; the last one is row {last}",
            hint=f"a duplicate or rejected row has none: lorasmith data ledger {data}",
        )
    return chosen


def example_parts(workbench: Workbench, name: str) -> dict[Part, list[Example]]:
    """The parts of a dataset; a file is read as it would be imported, and nothing is stored."""
    path = Path(name).expanduser()
    if find_version(workbench, name) is None and name not in DATASETS and path.is_file():
        return curate(path, DataPreparationSpec()).parts
    dataset = find_dataset(workbench, name)
    return {part: list(read_examples(workbench, dataset, part)) for part in PARTS}
