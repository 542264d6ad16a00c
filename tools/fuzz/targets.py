"""What must hold for every input of a parser, whatever is in it. Each target raises where something does not.

An error that a user can meet (`LorasmithError`) is an answer; any other exception is a finding. Where a parser of the
standard library reads the same input, ours must read the same. Time and memory for one input are bounded by whoever
runs the targets.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from lorasmith.errors import LorasmithError
from lorasmith.files import verify_manifest
from lorasmith.schemas.data import DataImportSpec, DataPreparationSpec, DatasetFormat, Example, LedgerLine, Mend
from lorasmith.services.data import ledger_lines, read_examples
from lorasmith.services.data_checks import check_texts
from lorasmith.services.data_conversion import convert
from lorasmith.services.data_csv import csv_rows, find_dialect
from lorasmith.services.data_formats import detect_format
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_json import json_rows, jsonl_rows
from lorasmith.services.data_mending import mended
from lorasmith.services.data_reading import Source
from lorasmith.services.data_removal import remove_dataset
from lorasmith.services.data_rows import BrokenRow, RawRow
from lorasmith.services.data_tables import parquet_rows
from lorasmith.services.data_turns import BadRow
from lorasmith.services.data_validation import validate_data
from lorasmith.services.data_writing import ROW_OF, Inexpressible
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings

Target = Callable[[bytes, Path], None]
Rows = Iterator[RawRow | BrokenRow]
KINDS = (".json", ".jsonl", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".jsonl.zst", ".parquet")
FORMATS = tuple(DatasetFormat)
MENDS: tuple[Mend, ...] = ("mojibake", "control-characters", "join-turns")


class Disagreement(Exception):
    """Ours and the reference read the same input, and not as the same."""


def agree(ours: object, reference: object, what: str) -> None:
    if repr(ours) != repr(reference):  # of NaN too
        raise Disagreement(f"{what}: {ours!r:.300} against {reference!r:.300}")


def outcome(rows: Rows) -> list[RawRow | BrokenRow] | None:
    """None where the whole input is refused."""
    try:
        return list(rows)
    except LorasmithError:
        return None


def ignored(position: int) -> None:
    pass


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key twice")
    for key in values:
        key.encode()
    return values


def read_document(data: bytes, folder: Path) -> None:
    """`JsonScanner` against `json.loads`."""
    path = folder / "rows.json"
    path.write_bytes(data)
    ours = outcome(json_rows(path, ignored))
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        if ours is not None:
            raise Disagreement(f"json.loads refuses what we read: {ours!r:.300}") from None
        return
    items = listed(value)
    if ours is None:
        deep = data.count(b"[") + data.count(b"{") > 500
        if items and not deep and all_keys_once(data):
            raise Disagreement(f"refused, though json.loads reads {value!r:.300}")
        return
    whole = [row for row in ours if isinstance(row, RawRow)]
    agree([row.number for row in ours], list(range(1, len(ours) + 1)), "numbers of rows")
    if items is None:
        raise Disagreement(f"read as rows, though it is {value!r:.300}")
    agree(len(ours), len(items), "rows")
    agree([row.values for row in whole], [items[row.number - 1] for row in whole], "values")
    if all_keys_once(data):
        agree(len(whole), sum(isinstance(item, dict) for item in items), "rows that are objects")


def listed(value: Any) -> list[Any] | None:
    """The rows of a document as its reader takes them, None where it has none."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return None
    lists = [key for key, one in value.items() if isinstance(one, list)]
    if {"messages", "conversations"} & set(lists):
        return [value]
    return value[lists[0]] if len(lists) == 1 else None


def all_keys_once(data: bytes) -> bool:
    try:
        json.loads(data.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except ValueError:
        return False
    return True


def read_lines(data: bytes, folder: Path) -> None:
    """The reader of JSON Lines against `json.loads` of each line."""
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    ours = outcome(jsonl_rows(path, ignored))
    if ours is None:
        raise Disagreement("a file of lines is refused as a whole")
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    agree(len(ours), len(lines), "rows and lines that are not blank")
    for row, line in zip(ours, lines, strict=True):
        try:
            value = json.loads(line.decode(), object_pairs_hook=unique_keys)
        except (ValueError, RecursionError):
            value = None
        agree(getattr(row, "values", None), value if isinstance(value, dict) else None, f"line {row.line}")
    skipped = outcome(jsonl_rows(path, ignored, skip=1)) or []
    agree(skipped[1:], ours[1:], "rows behind the first that is passed over")


def read_table(data: bytes, folder: Path) -> None:
    """The reader of CSV against the csv module on the whole text, with the encoding and separator that were found."""
    for name in ("rows.csv", "rows.tsv"):
        path = folder / name
        path.write_bytes(data)
        try:
            dialect = find_dialect(path)
        except LorasmithError:
            continue
        ours = outcome(csv_rows(path, dialect, ignored))
        try:
            text = io.StringIO(data.decode(dialect.encoding), newline="")
            if dialect.separator_line:
                text.readline()
            records = [record for record in csv.reader(text, delimiter=dialect.separator, strict=True) if record]
        except (csv.Error, UnicodeError) as error:
            if ours is not None:
                raise Disagreement(f"the csv module refuses ({error}) what we read: {ours!r:.300}") from None
            continue
        names = [name.strip() or f"column {number}" for number, name in enumerate(records[0], 1)] if records else []
        if ours is None:
            if len(set(names)) == len(names):
                raise Disagreement(f"refused, though the csv module reads {records!r:.300}")
            continue
        expected = [dict(zip(names, one, strict=True)) if len(one) == len(names) else None for one in records[1:]]
        agree([getattr(row, "values", None) for row in ours], expected, "records")


def read_packed(data: bytes, folder: Path) -> None:
    """Parquet, gzip and zstd files: read or refused. A whole gzip file reads as what is in it."""
    for name in ("rows.jsonl.gz", "rows.csv.gz", "rows.jsonl.zst", "rows.parquet"):
        path = folder / name
        path.write_bytes(data)
        outcome(parquet_rows(path, ignored) if name.endswith(".parquet") else Source.open(path).rows())
    (folder / "plain.jsonl").write_bytes(data)
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(data, 1))
    plain, packed = (outcome(Source.open(folder / name).rows()) for name in ("plain.jsonl", "rows.jsonl.gz"))
    if plain is not None:
        agree(fields_of(packed or []), fields_of(plain), "rows of a packed file")


def fields_of(rows: list[RawRow | BrokenRow]) -> list[tuple[Any, ...]]:
    return [(row.number, row.line, getattr(row, "values", None)) for row in rows]


def convert_rows(data: bytes, folder: Path) -> None:
    """Detection and conversion of any JSON objects, in the format that is found and in one that is forced.

    An example says the same after it was written in its format and read again.
    """
    try:
        value = json.loads(data[1:])
    except (ValueError, RecursionError):
        return
    rows = [row for row in (value if isinstance(value, list) else [value]) if isinstance(row, dict)]
    if not rows:
        return
    formats = {FORMATS[data[0] % len(FORMATS)]}
    with suppress(LorasmithError):
        formats.add(detect_format(rows).format)
    for format in formats:
        for number, values in enumerate(rows, start=1):
            for read in (values, mended(values, MENDS)[0]):
                try:
                    example = convert(RawRow(number, None, read), format)
                except BadRow as refused:
                    refused.message.encode()
                    continue
                list(check_texts(example))
                stored = Example.model_validate_json(example.model_dump_json(exclude_none=True))
                agree(stored, example, "an example that is stored and read")
                written_and_read(example, format)


def written_and_read(example: Example, format: DatasetFormat) -> None:
    try:
        row = ROW_OF[format](example)
    except Inexpressible:
        return
    again = convert(RawRow(example.row, None, json.loads(json.dumps(row))), format)
    agree(again.content(), example.content(), f"a row of {format} that is written and read")


@cache
def workbench_in(folder: Path) -> Workbench:
    return Workbench.open(Settings(home=folder / "home"))  # makes a database: most of the time of an import


def import_file(data: bytes, folder: Path) -> None:
    """A whole import: a dataset whose ledger accounts for each row, or an error and nothing; `validate` says the same."""
    workbench = workbench_in(folder)
    datasets = folder / "home" / "datasets"
    path = folder / f"rows{KINDS[(data[:1] or b'0')[0] % len(KINDS)]}"
    path.write_bytes(data[1:])
    options = DataPreparationSpec(max_rejected_share=0.5)
    verdict: str | None = ""
    try:
        dataset = import_dataset(workbench, path, DataImportSpec(name="fuzz", **options.model_dump()))
    except LorasmithError as error:
        verdict = error.message.partition(":\n  ")[0]
        agree(list(datasets.glob("*")) if datasets.exists() else [], [], "what a refused file leaves behind")
    else:
        verdict = None
        stored = workbench.path(dataset.folder)
        verify_manifest(stored)
        ledger: list[LedgerLine] = list(ledger_lines(workbench, "fuzz"))
        agree([line.row for line in ledger], list(range(1, len(ledger) + 1)), "rows of the ledger")
        agree(sum(dataset.fates.values()), len(ledger), "fates and rows")
        examples = list(chain.from_iterable(read_examples(workbench, dataset, part) for part in dataset.part_sizes))
        kept = sorted((line.row, line.example_id) for line in ledger if line.part is not None)
        agree(sorted((example.row, example.id) for example in examples), kept, "examples and the ledger's")
        remove_dataset(workbench, "fuzz")
        agree(list(datasets.glob("*")), [], "what a removed dataset leaves behind")
    finding_rows: list[int] = []
    try:
        checked = validate_data(workbench, str(path), options, lambda finding: finding_rows.append(finding.row))
    except LorasmithError as error:
        agree(error.message, verdict, "the errors of validate and import")
    else:
        agree(checked.error, verdict, "the verdicts of validate and import")


TARGETS: dict[str, Target] = {
    "json": read_document,
    "jsonl": read_lines,
    "csv": read_table,
    "packed": read_packed,
    "conversion": convert_rows,
    "import": import_file,
}
