"""Raw rows from JSON, JSON Lines and CSV files, with the row and line of each.

What is wrong with a whole file (broken JSON, an odd number of columns) stops the reading: behind it the rows cannot be
trusted. What is wrong with the content of one row is found later, in `data_conversion`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorasmith.errors import InvalidData, NotFound

Layout = Literal["json", "jsonl", "csv"]
SUPPORTED = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
SUPPORTED_TEXT = "a JSON array (.json), JSON Lines (.jsonl, .ndjson) or CSV (.csv), plain or with .gz"
OTHER_FORMATS = {
    ".parquet": "pandas.read_parquet(FILE).to_json('rows.jsonl', orient='records', lines=True) converts it",
    ".xlsx": "save the sheet as CSV UTF-8",
    ".xls": "save the sheet as CSV UTF-8",
    ".tsv": "save it with commas as .csv",
    ".zip": "unpack it first",
}
LARGEST_CSV_FIELD = 64 * 1024 * 1024  # characters; the csv module stops at 131,072, which a long document passes
BOUNDARY = re.compile(r"[\s,:]*")  # what stands between the values of a JSON document


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in the file. `number` counts rows from 1; `line` is where the row begins."""

    number: int
    line: int
    values: dict[str, Any]


def read_rows(path: Path) -> Iterator[RawRow]:
    """Every row of a file. The content decides between JSON and JSON Lines, whatever the extension says."""
    text = read_text(path)
    match find_layout(path, text):
        case "csv":
            rows = csv_rows(path, text)
        case "json":
            rows = json_rows(path, text)
        case "jsonl":
            rows = jsonl_rows(path, text)
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise InvalidData(f"{path} holds no rows, expected at least one", hint="check that it is the right file")


def read_text(path: Path) -> str:
    """The whole file as text; a byte-order mark is dropped."""
    extension = inner_extension(path)
    if not path.exists():
        raise NotFound(f"no file {path}", hint="check the path; it is relative to the present folder")
    if path.is_dir():
        raise InvalidData(f"{path} is a folder, expected a file: {SUPPORTED_TEXT}", hint="name one file in it")
    if extension not in SUPPORTED:
        way_out = OTHER_FORMATS.get(extension, "convert it, or give it the extension of what it holds")
        raise InvalidData(f"{path} has the extension {extension!r}, expected {SUPPORTED_TEXT}", hint=way_out)
    try:
        data = path.read_bytes()
    except PermissionError:
        raise InvalidData(f"{path} cannot be read: permission denied", hint=f"chmod u+r {path}") from None
    if path.suffix.lower() == ".gz":
        data = unpacked(path, data)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidData(
            f"{path}:{line}: found the byte 0x{data[error.start]:02x}, which is not UTF-8, expected UTF-8 text",
            hint=f"iconv -f {guess_encoding(data)} -t utf-8 {path} converts it, if that is its encoding",
        ) from None
    if not text.strip():
        raise InvalidData(f"{path} is empty, expected at least one row", hint="check that it is the right file")
    return text


def inner_extension(path: Path) -> str:
    """`.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`."""
    packed = path.suffix.lower() == ".gz"
    return (path.with_suffix("") if packed else path).suffix.lower()


def unpacked(path: Path, data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise InvalidData(f"{path} is not a whole gzip file: {error}", hint="copy or download it again") from error


def guess_encoding(data: bytes) -> str:
    return "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "windows-1252"


def find_layout(path: Path, text: str) -> Layout:
    """What the content is: extensions lie, a `.json` from an export is often JSON Lines."""
    extension = SUPPORTED[inner_extension(path)]
    if extension == "csv" and not re.match(r'\s*(\[\s*)?\{\s*"', text):
        return "csv"
    start = text.lstrip()
    if start[0] == "[":
        return "json"
    if start[0] != "{":
        return "jsonl"
    first_line, _, rest = start.partition("\n")
    if is_json(first_line):
        return "json" if extension == "json" and not rest.strip() else "jsonl"
    return "json" if extension == "json" or is_json(text) else "jsonl"


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def parse_json(path: Path, text: str, line: int, expected: str) -> Any:
    """`text` begins on `line` of the file; errors name the line on which the JSON breaks."""
    try:
        return json.loads(text, object_pairs_hook=checked_object)
    except json.JSONDecodeError as error:
        found = text.split("\n")[error.lineno - 1][max(error.colno - 21, 0) : error.colno + 20]
        line += error.lineno - 1
        what = f"broken JSON at column {error.colno}: {error.msg}, found {found!r}"
    except RecursionError:
        what = "found JSON that is nested too deeply"
    except ValueError as error:
        what = f"broken JSON: {error}"
    csv_like = line == 1 and text.lstrip()[:1] not in "[{"
    way_out = "if the file is CSV, name it .csv" if csv_like else f"mend line {line}, then run the command again"
    raise InvalidData(f"{path}:{line}: {what}; expected {expected}", hint=way_out)


def checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        raise ValueError(f"half of a surrogate pair in one of the keys {list(values)!a}") from None
    return values


def jsonl_rows(path: Path, text: str) -> Iterator[RawRow]:
    number = 0
    expected = "one JSON object a line"
    for line, content in enumerate(text.split("\n"), start=1):  # splitlines() would cut at U+2028 inside a string
        if not content.strip():
            continue
        number += 1
        yield object_row(path, number, line, parse_json(path, content.strip("\r"), line, expected), expected)


def json_rows(path: Path, text: str) -> Iterator[RawRow]:
    document = parse_json(path, text, 1, "a list of objects")
    if isinstance(document, list):
        key = None
    else:
        key = wrapping_key(path, document)
        if key in ("messages", "conversations"):  # the document is itself a row
            yield RawRow(1, 1, document)
            return
    line, counted = 1, 0
    for number, (start, value) in enumerate(list_items(text, key), start=1):
        line += text.count("\n", counted, start)
        counted = start
        yield object_row(path, number, line, value, "a list of objects")


def wrapping_key(path: Path, document: Any) -> str:
    """The key of the only list in an object such as `{"version": 1, "rows": [...]}`."""
    found = "an object without a list"
    if isinstance(document, dict):
        keys: list[str] = [key for key, value in document.items() if isinstance(value, list)]
        if len(keys) == 1:
            return keys[0]
        if keys:
            found = f"an object with {len(keys)} lists ({', '.join(keys)})"
    else:
        found = f"a {type(document).__name__}"
    raise InvalidData(
        f"{path} holds {found}, expected a list of objects, or an object with a single list",
        hint='write the rows as [{"instruction": "…", "output": "…"}, …], or one object a line in a .jsonl file',
    )


def list_items(text: str, key: str | None) -> Iterator[tuple[int, Any]]:
    """(offset, value) of each item of the document's list, or of the list under `key`. The document is valid JSON."""
    decode = json.JSONDecoder().raw_decode
    position = past(text, 0) + 1
    while key is not None:
        name, position = decode(text, past(text, position))
        position = past(text, position)
        if name == key:
            position += 1
            break
        _, position = decode(text, position)
    while text[position := past(text, position)] != "]":
        value, end = decode(text, position)
        yield position, value
        position = end


def past(text: str, position: int) -> int:
    match = BOUNDARY.match(text, position)
    assert match is not None
    return match.end()


def object_row(path: Path, number: int, line: int, value: Any, expected: str) -> RawRow:
    if not isinstance(value, dict):
        raise InvalidData(
            f"{path}:{line}: row {number} is {json.dumps(value)[:60]}, expected {expected}",
            hint=f"mend or remove line {line}",
        )
    return RawRow(number, line, value)


def csv_rows(path: Path, text: str) -> Iterator[RawRow]:
    csv.field_size_limit(LARGEST_CSV_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    number = 0
    line = 1
    try:
        for record in reader:
            if not record:  # a blank line
                pass
            elif header is None:
                header = csv_header(path, line, record)
            else:
                number += 1
                if len(record) != len(header):
                    raise column_count_error(path, line, number, record, header)
                yield RawRow(number, line, dict(zip(header, record, strict=True)))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InvalidData(
            f"{path}:{line}: broken CSV in the row that begins here: {error}",
            hint='put quotes around a value with a comma or a line break, and double a quote inside it: "say ""hi"""',
        ) from None


def csv_header(path: Path, line: int, record: list[str]) -> list[str]:
    header = [name.strip() or f"column {number}" for number, name in enumerate(record, start=1)]
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if len(header) == 1 and separator in header[0]:
            raise InvalidData(
                f"{path}:{line}: the header is {record[0]!r}, separated by {name}, expected commas",
                hint="save the file as CSV with commas",
            )
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise InvalidData(
            f"{path}:{line}: the header names {', '.join(map(repr, repeated))} more than once, expected unique names",
            hint="rename or remove one of the columns",
        )
    return header


def column_count_error(path: Path, line: int, number: int, record: list[str], header: list[str]) -> InvalidData:
    too_many = len(record) > len(header)
    names = ", ".join(header)
    return InvalidData(
        f"{path}:{line}: row {number} has {len(record)} columns, expected {len(header)} as in the header ({names})",
        hint='put quotes around a value that contains a comma: "yes, please"'
        if too_many
        else "an empty value still needs its comma",
    )
