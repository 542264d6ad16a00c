"""`data validate`: a source read and checked as an import would, and nothing kept of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.files import verify_manifest
from lorasmith.schemas.data import PARTS, DataPreparationSpec, Dataset, Detection, FindingName, LedgerLine
from lorasmith.schemas.validation import RowFinding, Validation
from lorasmith.services.data import part_path, read_examples
from lorasmith.services.data_curation import Curation
from lorasmith.services.data_decision import fate_counts
from lorasmith.services.data_detection import DETECTION_ROWS, check_limits
from lorasmith.services.data_files import SourceFile
from lorasmith.services.data_import import open_context
from lorasmith.services.data_progress import Report, silent
from lorasmith.services.data_reading import Source
from lorasmith.services.data_rows import RawRow
from lorasmith.services.data_sources import neither_dataset_nor_file
from lorasmith.services.data_split import assign_parts
from lorasmith.services.data_versions import find_version
from lorasmith.services.data_writing import own_row
from lorasmith.starter.location import DATASETS, starter_dataset

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy

OF_FILES: dict[str, Any] = {"format": "auto", "column_map": {}, "encoding": None, "mend": []}


def validate_data(
    workbench: Workbench,
    source: str,
    spec: DataPreparationSpec,
    found: Callable[[RowFinding], None],
    report: Report = silent,
) -> Validation:
    """What an import of `source` with that spec would say of its rows; `found` is given each finding as it is made.

    A source is what an import takes, or the name of a dataset: then its files are held against their checksums, and its
    rows are checked with the options at hand. Raises what an import raises before it reads a row (`NotFound`,
    `InvalidSpec`); what stops it later is the result's `error`.
    """
    counts: Counter[FindingName] = Counter()

    def follow(line: LedgerLine) -> None:
        rejected = line.fate == "rejected"
        for one in line.flags or ():
            counts[one.check] += 1
            where = {"file": line.file, "line": line.line, "row": line.row, "rejected": rejected}
            found(RowFinding(**where, **one.model_dump()))

    context = open_context(workbench, spec.tokenizer) if spec.tokenizer else None
    dataset = find_version(workbench, source)
    opened = (
        open_stored(workbench, dataset, spec) if dataset else Source.open(path_of(workbench, source), spec.encoding)
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        Curation(Path(folder), opened, spec, context=context, follow=follow) as work,
    ):
        problem: InvalidData | None = None
        try:
            if dataset is not None:
                verify_manifest(workbench.path(dataset.folder))
                work.found_format = Detection(format=dataset.format, reason=dataset.format_reason)
                head = [row.values for row in islice(StoredRows(workbench, dataset).rows(), DETECTION_ROWS)]
                check_limits(head, dataset.format, spec, dataset.name)
            work.read(report)
            if dataset is None:
                assign_parts(work.index, work.pinned, spec)
        except InvalidData as error:
            problem = error
        problem = work.objection or problem
        detection = work.detection if work.found_format else None
        return Validation(
            source=source,
            format=detection.format if detection else None,
            format_reason=detection.reason if detection else None,
            rows=work.fates.total(),
            fates=fate_counts(work.fates),
            counts=dict(counts.most_common()),
            passes=problem is None,
            error=problem.message if problem else None,
            hint=problem.hint if problem else None,
        )


def path_of(workbench: Workbench, source: str) -> Path:
    """Of a file, a folder, a built-in dataset or an id on the hub. Raises `NotFound` for what looks like none of them."""
    path = Path(source).expanduser()
    if path.exists() or "/" in source or path.suffix:
        return path
    if source in DATASETS:
        return starter_dataset(source)
    raise neither_dataset_nor_file(workbench, source)


def open_stored(workbench: Workbench, dataset: Dataset, spec: DataPreparationSpec) -> Source:
    """The stored rows as a source. Raises `InvalidSpec` for an option that only says how a file is read."""
    for name, unset in OF_FILES.items():
        if getattr(spec, name) != unset:
            option = {"column_map": "map"}.get(name, name)
            raise InvalidSpec(
                f"--{option} says how a file is read, and {dataset.name!r} is a stored dataset",
                hint=f"leave it out, or name a file: lorasmith data validate FILE --{option} …",
            )
    stored = StoredRows(workbench, dataset)
    files = [SourceFile(path, path.name) for path in stored.files()]
    return Source(workbench.path(dataset.folder), files, stored, None)


class StoredRows:
    """Rows of a dataset by their number in its source, each with its example and as `data convert` would write it."""

    def __init__(self, workbench: Workbench, dataset: Dataset) -> None:
        self.workbench = workbench
        self.dataset = dataset

    def files(self) -> list[Path]:
        return [path for part in PARTS if (path := part_path(self.workbench, self.dataset, part)).is_file()]

    def rows(self) -> Iterator[RawRow]:
        for part in PARTS:
            path = part_path(self.workbench, self.dataset, part)
            for line, example in enumerate(read_examples(self.workbench, self.dataset, part), start=1):
                row = own_row(example, self.dataset.format)
                yield RawRow(example.row, line, row, file=path.name, part=part, example=example)
