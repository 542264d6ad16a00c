"""Raw rows of a source, one after another: of a file, a folder of files, a saved dataset or one on the hub.

What is wrong with a whole file (a JSON document that breaks off, a stray quote in CSV) stops the reading: behind it the
rows cannot be trusted. A row that cannot be read, with rows behind it that can, is a `BrokenRow`. What is wrong with
the content of a row is found later, in `data_conversion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal

from lorasmith.errors import InvalidData
from lorasmith.files import sha256_bytes, sha256_file
from lorasmith.services.data_csv import csv_rows, find_dialect
from lorasmith.services.data_files import (
    LARGEST_ROW,
    SUPPORTED,
    SourceFile,
    digest_of,
    inner_extension,
    is_saved_dataset,
    open_file,
    source_files,
)
from lorasmith.services.data_json import is_document, json_rows, jsonl_rows
from lorasmith.services.data_rows import BrokenRow, Library, RawRow
from lorasmith.services.data_tables import SavedDataset, is_hub_id, parquet_rows

Layout = Literal["json", "jsonl", "csv", "parquet"]
HEAD = 64 * 1024  # bytes


def read_rows(path: Path) -> Iterator[RawRow]:
    """Every row of a source; raises `InvalidData` at the first that cannot be read."""
    for row in Source.open(path).rows():
        if isinstance(row, BrokenRow):
            raise row.error()
        yield row


class Source:
    """What is imported. `notes` say how it was read, once it was; `bytes_read` of `bytes_total` say how far."""

    def __init__(self, path: Path, files: list[SourceFile], saved: Library | None, encoding: str | None) -> None:
        self.path = path
        self.files = files
        self.saved = saved
        self.encoding = encoding
        self.notes: list[str] = []
        self.bytes_total = sum(file.path.stat().st_size for file in files)
        self.bytes_read = 0

    @classmethod
    def open(cls, path: Path, encoding: str | None = None) -> Source:
        """Raises when there is nothing to read or it cannot be read."""
        if is_saved_dataset(path):
            saved = SavedDataset.of_folder(path)
        elif is_hub_id(path) and inner_extension(path) not in SUPPORTED:
            saved = SavedDataset.of_hub(path.as_posix())
        else:
            return cls(path, source_files(path), None, encoding)
        return cls(path, [SourceFile(file, file.name) for file in saved.files()], saved, encoding)

    def digest(self) -> str:
        """sha256 of what is read, whatever it is called."""
        if self.saved is not None and not self.path.exists():
            return sha256_bytes("".join(sha256_file(file.path) for file in self.files).encode())
        return digest_of(self.path)

    def place(self, row: RawRow | BrokenRow) -> str:
        """`folder/file.jsonl:3`, as far as it is known."""
        path = self.path / row.file if self.path.is_dir() else self.path
        return f"{path}:{row.line}" if row.line is not None else str(path)

    def rows(self, skip: int = 0) -> Iterator[RawRow | BrokenRow]:
        """Rows are numbered through all files; the first `skip` are passed over."""
        number = 0
        for row in self.saved.rows() if self.saved else self.rows_of_files(skip):
            number = row.number
            if number > skip:
                yield row
        if number == 0:
            raise InvalidData(
                f"{self.path} holds no rows, expected at least one", hint="check that it is the right file"
            )
        self.bytes_read = self.bytes_total

    def rows_of_files(self, skip: int) -> Iterator[RawRow | BrokenRow]:
        done = last = 0
        for file in self.files:
            before = last
            for row in self.rows_of(file, done, skip if len(self.files) == 1 else 0):
                last = before + row.number
                if isinstance(row, RawRow):
                    yield replace(row, number=last, file=file.name, part=file.part)
                elif row.number == 1 and len(self.files) == 1:
                    raise row.error()  # more likely the wrong kind of file than a wrong row
                else:
                    yield replace(row, number=last, file=file.name)
            done += file.path.stat().st_size

    def each_file(self) -> Iterator[tuple[SourceFile, Iterator[RawRow | BrokenRow]]]:
        """The files of a folder with several, each with its rows numbered from 1."""
        if self.saved is None and len(self.files) > 1:
            for file in self.files:
                yield file, self.rows_of(file, 0, 0)

    def rows_of(self, file: SourceFile, done: int, skip: int) -> Iterator[RawRow | BrokenRow]:
        def moved(position: int) -> None:
            self.bytes_read = done + position

        match find_layout(file.path):
            case "csv":
                dialect = find_dialect(file.path, self.encoding)
                self.notes += [note for note in dialect.notes if note not in self.notes]
                yield from csv_rows(file.path, dialect, moved)
            case "parquet":
                yield from parquet_rows(file.path, moved)
            case "json":
                yield from json_rows(file.path, moved)
            case "jsonl":
                yield from jsonl_rows(file.path, moved, skip)


def find_layout(path: Path) -> Layout:
    """What the content is: extensions lie, a `.json` from an export is often JSON Lines."""
    extension = inner_extension(path)
    if extension == ".parquet":
        return "parquet"
    with open_file(path) as file:
        head = first_bytes(path, file.stream)
        start = head.decode("utf-8-sig", errors="replace").lstrip()
        if extension in (".csv", ".tsv") and not re.match(r'(\[\s*)?\{\s*"', start):
            return "csv"
        if start[:1] != "{":
            return "json" if start[:1] == "[" else "jsonl"
        first_line, newline, rest = head.lstrip(b"\xef\xbb\xbf \t\r\n").partition(b"\n")
        if not newline:
            more, newline, rest = file.stream.readline(LARGEST_ROW).partition(b"\n")
            first_line += more
        line = first_line.decode(errors="replace")
        return "json" if is_document(path, line, text_pieces(rest, file.stream)) else "jsonl"


def first_bytes(path: Path, stream: BinaryIO) -> bytes:
    """The first bytes that are not blank. Raises `InvalidData` when there are none."""
    head = stream.read(HEAD)
    while head and not head.decode("utf-8-sig", errors="replace").strip():
        head = stream.read(HEAD)
    if not head:
        raise InvalidData(f"{path} is empty, expected at least one row", hint="check that it is the right file")
    return head


def text_pieces(first: bytes, stream: BinaryIO) -> Iterator[str]:
    piece = first
    while True:
        yield piece.decode(errors="replace")
        if not (piece := stream.read(HEAD)):
            return
