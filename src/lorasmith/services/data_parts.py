"""The last pass of an import: each row that stays to the file of its part, and the ledger with the parts in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from lorasmith.files import disk_errors
from lorasmith.schemas.data import PARTS, STAYS, LedgerLine, Part
from lorasmith.services.data_index import ImportIndex
from lorasmith.services.data_progress import REPORT_EVERY_ROWS, Progress, Report
from lorasmith.services.data_statistics import PartStatistics

LEDGER = "ledger.jsonl"


def write_parts(
    folder: Path, rows: Path, ledger: Path, index: ImportIndex, num_rows: int, report: Report
) -> PartStatistics:
    """Parts and ledger into `folder`; `rows` has one example for each line of `ledger` that stays, in its order."""
    statistics = PartStatistics()
    with disk_errors(folder), open_parts(folder) as files:
        examples = lines(rows)
        with (folder / LEDGER).open("w", encoding="utf-8", newline="\n") as written:
            for text in lines(ledger):
                line = LedgerLine.model_validate_json(text)
                if line.fate in STAYS:
                    example = next(examples)
                    values = json.loads(example)
                    line.part = line.part or index.part_of(values["group"])
                    files[line.part].write(example)
                    statistics.add(values, line.part)
                    text = line.model_dump_json(exclude_none=True) + "\n"
                written.write(text)
                if line.row % REPORT_EVERY_ROWS == 0:
                    report(Progress("writing", line.row, num_rows, num_rows))
    return statistics


@contextmanager
def open_parts(folder: Path) -> Iterator[dict[Part, IO[str]]]:
    """The files of the three parts, open for writing."""
    with ExitStack() as stack:
        yield {
            part: stack.enter_context((folder / f"{part}.jsonl").open("w", encoding="utf-8", newline="\n"))
            for part in PARTS
        }


def lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="\n") as handle:
        yield from handle
