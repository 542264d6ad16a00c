"""One pass over a source: each row checked and converted, with one ledger line; then parts, in a second pass.

Reading holds one row in memory; what all rows leave behind is in the index and in two files of the working folder.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from lorasmith.errors import InvalidData
from lorasmith.faults import fault_point
from lorasmith.files import disk_errors
from lorasmith.interrupts import between_interrupts
from lorasmith.schemas.data import (
    PARTS,
    DataPreparationSpec,
    Detection,
    Example,
    Fate,
    Finding,
    LedgerLine,
    Part,
)
from lorasmith.services.data_checks import ContextCheck, LanguageCheck, check_lengths, check_texts
from lorasmith.services.data_conversion import convert, explicit_part, ignored_fields
from lorasmith.services.data_decision import check_decision, decide_rows, fate_counts
from lorasmith.services.data_detection import detect_source, first_rows
from lorasmith.services.data_digests import duplicate_digest
from lorasmith.services.data_index import ImportIndex
from lorasmith.services.data_mapping import apply_mapping
from lorasmith.services.data_mending import mended
from lorasmith.services.data_parts import LEDGER, ReadRows, lines
from lorasmith.services.data_progress import REPORT_EVERY_ROWS, Progress, Report, silent
from lorasmith.services.data_reading import Source
from lorasmith.services.data_rows import BrokenRow, RawRow
from lorasmith.services.data_split import group_position
from lorasmith.services.data_turns import BadRow

SHOWN_FINDINGS = 3
COMMIT_EVERY_S = 5.0
ROWS = "rows.jsonl"
INDEX = "index.sqlite"
SEARCH = "near-duplicates"


@dataclass(frozen=True)
class CuratedData:
    """What a file became. Examples stand in the order of their rows; `ledger` has one line for each input row."""

    detection: Detection
    parts: dict[Part, list[Example]]
    ledger: list[LedgerLine]
    statistics: dict[str, Any]

    @property
    def examples(self) -> list[Example]:
        return [example for part in PARTS for example in self.parts[part]]

    def fates(self) -> dict[Fate, int]:
        return fate_counts(Counter(line.fate for line in self.ledger))

    def part_sizes(self) -> dict[Part, int]:
        return {part: len(self.parts[part]) for part in PARTS}


def curate(path: Path, spec: DataPreparationSpec) -> CuratedData:
    """Read, convert, drop exact duplicates, split, all in memory: for a preview and for small sets.

    Raises `InvalidData` when too many rows are bad.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        Curation(Path(folder), Source.open(path, spec.encoding), spec) as work,
    ):
        work.read()
        written = Path(folder) / "dataset"
        written.mkdir()
        statistics = work.write(written)
        parts = {
            part: [Example.model_validate_json(line) for line in lines(written / f"{part}.jsonl")] for part in PARTS
        }
        ledger = [LedgerLine.model_validate_json(line) for line in lines(written / LEDGER)]
        return CuratedData(work.detection, parts, ledger, statistics)


Follow = Callable[[LedgerLine], None]


class Curation:
    """The work on one source in `folder`; opened on a folder in which it was broken off, it goes on there."""

    def __init__(
        self,
        folder: Path,
        source: Source,
        spec: DataPreparationSpec,
        *,
        context: ContextCheck | None = None,
        key: str = "",
        follow: Follow | None = None,
    ) -> None:
        """`key` says what is imported and how; what another one left in the folder is thrown away.

        With `follow` nothing is kept for a dataset: it is given the ledger line by line, and `strict` does not stop
        the reading, `objection` says what it would have stopped at.
        """
        self.follow = follow
        self.objection: InvalidData | None = None
        self.source = source
        self.spec = spec
        self.context = context
        self.language = LanguageCheck(spec.languages) if spec.languages else None
        self.index = ImportIndex(folder / INDEX)
        self.search_index = folder / SEARCH
        self.row_file = (folder / ROWS).open("ab")
        self.ledger_file = (folder / LEDGER).open("ab")
        state = self.index.state()
        if state is None or state["key"] != key:
            self.index.clear()
            if self.search_index.exists():
                shutil.rmtree(self.search_index)
            state = {"rows": 0, "sizes": [0, 0], "complete": False}
        self.key = key
        self.rows: int = state["rows"]
        self.complete: bool = state["complete"]
        for file, size in zip((self.row_file, self.ledger_file), state["sizes"], strict=True):
            file.truncate(size)
            file.seek(size)
        self.found_format: Detection | None = Detection(**state["detection"]) if state.get("detection") else None
        self.fates = Counter(state.get("fates", {}))
        self.findings = Counter(state.get("findings", {}))
        self.ignored = Counter(state.get("ignored", {}))
        self.languages = Counter(state.get("languages", {}))
        self.pinned: Counter[Part] = Counter(state.get("pinned", {}))
        self.shown: list[str] = state.get("shown", [])
        self.source.notes = state.get("notes", [])
        self.part_sizes: dict[Part, int] = {}  # known once the parts are written
        self.committed_at = time.monotonic()

    def __enter__(self) -> Curation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.index.connection.close()
        for file in (self.row_file, self.ledger_file):
            try:
                file.close()
            except OSError:  # the rest of its buffer does not fit; what was committed is on the disk
                if error is None:
                    raise

    @property
    def detection(self) -> Detection:
        """With what was found about the file on the way, such as its separator."""
        assert self.found_format is not None
        reason = "; ".join([self.found_format.reason, *self.source.notes])
        return Detection(format=self.found_format.format, reason=reason)

    def commit(self) -> None:
        files = (self.row_file, self.ledger_file)
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        fault_point("import.flushed")
        self.index.commit(
            {
                "key": self.key,
                "rows": self.rows,
                "sizes": [file.tell() for file in files],
                "complete": self.complete,
                "detection": self.found_format.model_dump() if self.found_format else None,
                "fates": self.fates,
                "findings": self.findings,
                "ignored": self.ignored,
                "languages": self.languages,
                "pinned": self.pinned,
                "shown": self.shown,
                "notes": self.source.notes,
            }
        )
        self.committed_at = time.monotonic()
        fault_point("import.committed")

    def read(self, report: Report = silent) -> None:
        """Every row to the working folder. Raises `InvalidData` when too many cannot be used."""
        if not self.complete:
            with disk_errors(Path(self.row_file.name)):
                phase: Literal["reading", "continuing"] = "continuing" if self.rows else "reading"
                report(Progress(phase, 0, self.source.bytes_total, self.rows))
                for row in between_interrupts(self.detected(self.source.rows(skip=self.rows))):
                    if self.rows == self.spec.max_rows:
                        self.source.notes.append(f"only its first {self.rows} rows were read, as asked")
                        break
                    self.take(row)
                    if self.rows % REPORT_EVERY_ROWS == 0:
                        report(Progress("reading", self.source.bytes_read, self.source.bytes_total, self.rows))
                        if time.monotonic() - self.committed_at > COMMIT_EVERY_S:
                            self.commit()
                self.complete = True
                fault_point("import.read")
                self.commit()
            report(Progress("reading", self.source.bytes_total, self.source.bytes_total, self.rows))
        self.check_share()

    def detected(self, rows: Iterator[RawRow | BrokenRow]) -> Iterator[RawRow | BrokenRow]:
        """The rows; before the first comes out, the format is found from those at the beginning."""
        if self.found_format is None:
            head = first_rows(rows)
            self.found_format = detect_source(self.source, head, self.spec)
            check_decision(self.spec, self.found_format.format, str(self.source.path))
            rows = chain(head, rows)
        yield from rows

    def take(self, row: RawRow | BrokenRow) -> None:
        """The fate of one row."""
        if isinstance(row, BrokenRow):
            if self.spec.strict:
                self.stop_at(row.error())
            finding = Finding(
                check="unusable", field="row", found=row.found.removeprefix("found "), expected=row.expected
            )
            self.reject(row, None, row.sentence, [finding])
        else:
            try:
                self.curate(row)
            except BadRow as problem:
                if self.spec.strict:
                    self.stop_at(self.strict_error(row, problem.message))
                self.reject(row, problem.field, problem.message, problem.findings)
        self.rows = row.number

    def curate(self, row: RawRow) -> None:
        assert self.found_format is not None
        changes: list[str] = []
        values, example, part = row.values, row.example, row.part
        if example is None:
            values, changes = mended(apply_mapping(values, self.spec.column_map), self.spec.mend)
            part = explicit_part(values) or part
            example = convert(RawRow(row.number, row.line, values), self.found_format.format)
            self.ignored.update(ignored_fields(values, self.found_format.format))
        details: dict[str, Any] = {}
        findings = [*check_lengths(values, self.spec), *check_texts(example)]
        if self.language:
            details["language"] = self.language.language(example, self.found_format.format)
            self.languages[details["language"]] += 1
            findings += self.language.check(details["language"], self.found_format.format)
        if self.context:
            details["tokens"] = self.context.tokens(example)
            findings += self.context.check(details["tokens"])
        self.judge(row, findings)
        first = self.index.first_with(duplicate_digest(example), row.number, example.id)
        if first is not None:
            number, example_id = first
            reason = f"same content as row {number}"
            details |= {"example_id": example_id, "duplicate_of_row": number, "reason": reason}
            self.add(row, Fate.EXACT_DUPLICATE, **details)
            return
        self.findings.update({finding.check for finding in findings})
        if changes:
            details["changes"] = changes
        self.add(
            row,
            Fate.CHANGED if changes else Fate.KEPT,
            example_id=example.id,
            asked_part=part,
            flags=findings or None,
            **details,
        )
        if self.follow is None:
            self.row_file.write(example.model_dump_json(exclude_none=True).encode() + b"\n")
        self.index.add_to_group(example.group, group_position(example.group, self.spec.salt), part)
        if part is not None:
            self.pinned[part] += 1

    def judge(self, row: RawRow, findings: list[Finding]) -> None:
        """Raise for a finding that rejects the row: a limit that was given, or a check that the spec names."""
        for finding in findings:
            if self.spec.strict:
                self.stop_at(self.strict_error(row, f"{finding.sentence()} (check `{finding.check}`)"))
            if finding.check in ("too-short", "too-long") or finding.check in self.spec.reject:
                raise BadRow(finding.field, finding.found, finding.expected, findings)

    def stop_at(self, error: InvalidData) -> None:
        if self.follow is None:
            raise error from None
        self.objection = self.objection or error

    def strict_error(self, row: RawRow, sentence: str) -> InvalidData:
        return InvalidData(
            f"{self.source.place(row)}: row {row.number}, {sentence}", hint="mend the row, or leave --strict out"
        )

    def reject(self, row: RawRow | BrokenRow, field: str | None, sentence: str, findings: Sequence[Finding]) -> None:
        if self.follow is None and len(self.shown) < SHOWN_FINDINGS:
            self.shown.append(f"  {self.source.place(row)}: row {row.number}, {sentence}")
        self.add(row, Fate.REJECTED, field=field, reason=sentence, flags=findings)

    def add(self, row: RawRow | BrokenRow, fate: Fate, **details: Any) -> None:
        line = LedgerLine(row=row.number, file=row.file, line=row.line, fate=fate, **details)
        if self.follow is not None:
            self.follow(line)
        else:
            self.ledger_file.write(line.model_dump_json(exclude_none=True).encode() + b"\n")
        self.fates[fate.value] += 1

    def check_share(self) -> None:
        rejected, rows = self.fates[Fate.REJECTED.value], self.fates.total()
        share = rejected / rows
        if share <= self.spec.max_rejected_share and rejected < rows:
            return
        more = [f"  and {rejected - len(self.shown)} more"] if rejected > len(self.shown) else []
        listed = ":\n" + "\n".join(self.shown + more) if self.shown else ""
        nothing_left = rejected == rows
        limit = (
            "so nothing is left" if nothing_left else f"more than the allowed share of {self.spec.max_rejected_share:g}"
        )
        enough = max(0.05, math.ceil(share * 100) / 100)
        raise InvalidData(
            f"{rejected} of {rows} rows of {self.source.path} cannot be used, {limit}" + listed,
            hint="mend the rows"
            if nothing_left
            else f"mend the rows, or leave them out, with a line each in the ledger: lorasmith data import … --max-rejected {enough:.2f}",
        )

    def write(self, folder: Path, report: Report = silent) -> dict[str, Any]:
        """The parts and the whole ledger into `folder`; returns the statistics of the rows that stay."""
        decided = decide_rows(folder, self.read_rows(), self.spec, self.search_index, report)
        self.fates, self.part_sizes = decided.fates, decided.part_sizes
        return decided.statistics

    def read_rows(self) -> ReadRows:
        return ReadRows(
            rows=Path(self.row_file.name),
            ledger=Path(self.ledger_file.name),
            index=self.index,
            num_rows=self.rows,
            fates=self.fates,
            findings=self.findings,
            pinned=self.pinned,
            ignored=dict(self.ignored.most_common()),
            languages=dict(self.languages.most_common()),
        )
