"""Rows of CSV and TSV files: encoding and separator are found from the content, and said."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.services.data_files import LARGEST_ROW, inner_extension, open_file
from lorasmith.services.data_rows import BrokenRow, RawRow

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SAMPLE = 64 * 1024  # bytes
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
UNDEFINED_IN_1252 = b"\x81\x8d\x8f\x90\x9d"
HIGH_RUN = re.compile(rb"[\x80-\xff]+")


@dataclass(frozen=True)
class Dialect:
    """How a file is read; `notes` say what was found that is not the usual."""

    encoding: str
    separator: str
    notes: tuple[str, ...]
    separator_line: bool = False  # Excel's `sep=;` above the header


def find_dialect(path: Path, wanted_encoding: str | None = None) -> Dialect:
    """Encoding from the byte-order mark or all bytes, separator from the header and the rows below it."""
    encoding, note = (known_encoding(wanted_encoding), None) if wanted_encoding else find_encoding(path)
    with open_file(path) as file:
        sample = decoded_sample(path, file.stream.read(SAMPLE), encoding)
    stated = re.match(r'"?sep=(.)"?\r?\n', sample)
    separator = stated[1] if stated else find_separator(sample, "\t" if inner_extension(path) == ".tsv" else ",")
    usual = "\t" if inner_extension(path) == ".tsv" else ","
    notes = [note] if note else []
    if separator != usual:
        notes.append(f"separated by {SEPARATORS.get(separator, repr(separator))}")
    return Dialect(encoding, separator, tuple(notes), stated is not None)


def known_encoding(name: str) -> str:
    try:
        "".encode(name)
        return codecs.lookup(name).name
    except (LookupError, ValueError):
        raise InvalidSpec(
            f"no text encoding {name!r}", hint="--encoding utf-8, windows-1252, utf-16, shift_jis, …"
        ) from None


def decoded_sample(path: Path, data: bytes, encoding: str) -> str:
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)  # a character cut at the end is left out
    except UnicodeDecodeError as error:
        raise undecodable(path, encoding, error) from None


def undecodable(path: Path, encoding: str, error: UnicodeError) -> InvalidData:
    return InvalidData(f"{path} is not {encoding}: {error}", hint="leave --encoding out, or name the right one")


def find_encoding(path: Path) -> tuple[str, str | None]:
    """The encoding of a file, and what to say about it; raises `InvalidData` where it cannot be known."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines = 1
    with open_file(path) as file:
        data = file.stream.read(SAMPLE)
        for mark, encoding in BYTE_ORDER_MARKS.items():
            if data.startswith(mark):
                return encoding, f"encoding {encoding.upper()} by its byte-order mark"
        while data:
            try:
                decoder.decode(data)
            except UnicodeDecodeError as error:
                line = lines + error.object.count(b"\n", 0, error.start)
                return guess_encoding(path, line, error.object[error.start :], file.stream.read(SAMPLE))
            lines += data.count(b"\n")
            data = file.stream.read(1024 * 1024)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        return guess_encoding(path, lines, error.object[error.start :], b"")
    return "utf-8-sig", None


def guess_encoding(path: Path, line: int, data: bytes, more: bytes) -> tuple[str, str]:
    """windows-1252 where the bytes above 127 stand alone, as accented letters do; in other scripts they stand in runs."""
    found = f"the byte 0x{data[0]:02x}"
    sample = data + more
    runs = HIGH_RUN.findall(sample)
    alone = sum(len(run) == 1 for run in runs)
    plausible = not any(byte in UNDEFINED_IN_1252 for byte in b"".join(runs)) and alone >= 0.8 * len(runs)
    if not plausible or b"\0" in sample:
        raise InvalidData(
            f"{path}:{line}: found {found}, which is not UTF-8, expected UTF-8 text",
            hint="name the encoding if you know it: --encoding windows-1251, shift_jis, gb18030, …",
        )
    return "windows-1252", f"encoding windows-1252, because {found} on line {line} is not UTF-8"


def find_separator(sample: str, usual: str) -> str:
    """The one that cuts the header and most of the rows below it into the same number of columns, at least two."""
    whole = sample[: sample.rfind("\n") + 1] or sample
    scores = {separator: even_share(whole, separator) for separator in SEPARATORS}
    best = max(scores.values())
    if best == 0 or scores[usual] == best:
        return usual
    return next(separator for separator, score in scores.items() if score == best)


def even_share(text: str, separator: str) -> float:
    """Share of the first rows with as many columns as the header; 0 where the header has one column."""
    try:
        rows = list(islice(csv.reader(io.StringIO(text, newline=""), delimiter=separator), 50))
    except csv.Error:
        return 0.0
    rows = [row for row in rows if row]
    if not rows or len(rows[0]) < 2:
        return 0.0
    return sum(len(row) == len(rows[0]) for row in rows) / len(rows)


def csv_rows(path: Path, dialect: Dialect, moved: Callable[[int], None]) -> Iterator[RawRow | BrokenRow]:
    """A row for each record below the header. `moved` is told the position in the file."""
    csv.field_size_limit(LARGEST_ROW)  # the csv module stops at 131,072, which a long document passes
    with open_file(path) as file:
        text = io.TextIOWrapper(file.stream, encoding=dialect.encoding, newline="")
        try:
            for row in records(path, text, dialect):
                moved(file.position())
                yield row
        except UnicodeError as error:
            raise undecodable(path, dialect.encoding, error) from None
        finally:
            text.detach()


def records(path: Path, text: io.TextIOWrapper, dialect: Dialect) -> Iterator[RawRow | BrokenRow]:
    line = 1
    if dialect.separator_line:
        text.readline()
        line = 2
    offset = line - 1
    reader = csv.reader(bounded_lines(path, text), delimiter=dialect.separator, strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for record in reader:
            if not record:  # a blank line
                pass
            elif header is None:
                header = csv_header(path, line, record)
            else:
                number += 1
                if len(record) == len(header):
                    yield RawRow(number, line, dict(zip(header, record, strict=True)))
                else:
                    yield wrong_columns(path, line, number, record, header)
            line = reader.line_num + 1 + offset
    except csv.Error as error:
        raise InvalidData(
            f"{path}:{line}: broken CSV in the row that begins here: {error}",
            hint='put quotes around a value with a comma or a line break, and double a quote inside it: "say ""hi"""',
        ) from None


def bounded_lines(path: Path, text: io.TextIOWrapper) -> Iterator[str]:
    number = 0
    while line := text.readline(LARGEST_ROW + 1):
        number += 1
        if len(line) > LARGEST_ROW:
            raise InvalidData(
                f"{path}:{number}: found a line of more than {LARGEST_ROW} characters, expected rows of CSV",
                hint="check that it is the right file",
            )
        yield line


def csv_header(path: Path, line: int, record: Sequence[str]) -> list[str]:
    header = [name.strip() or f"column {number}" for number, name in enumerate(record, start=1)]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if repeated:
        raise InvalidData(
            f"{path}:{line}: the header names {', '.join(map(repr, repeated))} more than once, expected unique names",
            hint="rename or remove one of the columns",
        )
    return header


def wrong_columns(path: Path, line: int, number: int, record: Sequence[str], header: Sequence[str]) -> BrokenRow:
    too_many = len(record) > len(header)
    found, expected = (
        f"found {len(record)} column{'s' * (len(record) != 1)}",
        f"{len(header)} as in the header ({', '.join(header)})",
    )
    if too_many:
        hint = 'put quotes around a value that contains a comma: "yes, please"'
    else:
        hint = "an empty value still needs its comma"
    return BrokenRow(path, number, line, found, expected, hint=hint)
