"""The files that an import reads: one file or a folder of them, opened as plain bytes whatever packs them."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lorasmith.errors import InvalidData, MissingExtra, NotFound
from lorasmith.files import sha256_file
from lorasmith.schemas.data import Part

SUPPORTED = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".zst")
SUPPORTED_TEXT = (
    "a JSON array (.json), JSON Lines (.jsonl, .ndjson) or CSV (.csv, .tsv), plain or with .gz or .zst, or Parquet"
)
OTHER_FORMATS = {
    ".xlsx": "save the sheet as CSV UTF-8",
    ".xls": "save the sheet as CSV UTF-8",
    ".zip": "unpack it first",
    ".bz2": "unpack it first: bunzip2 FILE",
    ".xz": "unpack it first: unxz FILE",
}
UNKNOWN_FORMAT = (
    'give it the extension of what it holds, or convert it: of plain text each row as {"text": "…"} on a line of a '
    ".jsonl file"
)
LARGEST_ROW = 16 * 1024 * 1024  # bytes or characters; some four million tokens, beyond any model's context
BOMB_RATIO = 200  # text packs 3 to 20 times, one row repeated a million times 300 times
BOMB_BYTES = 32 * 1024 * 1024
PART_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")  # what `datasets.save_to_disk` writes


@dataclass(frozen=True)
class SourceFile:
    """`name` is how the ledger calls it; `part` is what the file's name says, for rows that do not say it."""

    path: Path
    name: str
    part: Part | None = None


def source_files(source: Path) -> list[SourceFile]:
    """The file itself, or the supported files of a folder in the order of their names. Raises where there are none."""
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.is_file() and is_supported(path, source))
        if not found:
            raise InvalidData(
                f"{source} is a folder without a file to import, expected {SUPPORTED_TEXT}", hint=way_out_of(source)
            )
        return [SourceFile(path, path.relative_to(source).as_posix(), part_of_name(path, source)) for path in found]
    check_file(source)
    return [SourceFile(source, source.name)]


def way_out_of(folder: Path) -> str:
    """For a folder whose files are of other kinds: what to do with the first that is known."""
    for path in sorted(folder.rglob("*")):
        if (way_out := OTHER_FORMATS.get(path.suffix.lower())) and path.is_file():
            return f"it holds {path.relative_to(folder)}: {way_out}"
    return "name the folder that holds the files"


def is_supported(path: Path, folder: Path) -> bool:
    hidden = any(piece.startswith(".") for piece in path.relative_to(folder).parts)
    return not hidden and inner_extension(path) in SUPPORTED


def part_of_name(path: Path, folder: Path) -> Part | None:
    """`val` of `validation-00000-of-00001.parquet` and of `dev/rows.jsonl`."""
    for piece in reversed(path.relative_to(folder).parts):
        word = re.match(r"[a-z]*", piece.lower())
        if word and word[0] in PART_NAMES:
            return cast(Part, PART_NAMES[word[0]])
    return None


def is_saved_dataset(source: Path) -> bool:
    return source.is_dir() and any((source / name).is_file() for name in SAVED_DATASET)


def check_file(path: Path) -> None:
    extension = inner_extension(path)
    if not path.exists():
        raise NotFound(f"no file {path}", hint="check the path; it is relative to the present folder")
    if not path.is_file():
        raise InvalidData(f"{path} is no regular file, expected {SUPPORTED_TEXT}", hint="write it to a file first")
    if extension not in SUPPORTED:
        way_out = OTHER_FORMATS.get(extension, UNKNOWN_FORMAT)
        raise InvalidData(f"{path} has the extension {extension!r}, expected {SUPPORTED_TEXT}", hint=way_out)
    try:
        path.open("rb").close()
    except PermissionError:
        raise InvalidData(f"{path} cannot be read: permission denied", hint=f"chmod u+r {path}") from None


def inner_extension(path: Path) -> str:
    """`.jsonl` of `rows.jsonl` and of `rows.jsonl.gz`."""
    packed = path.suffix.lower() in PACKED
    return (path.with_suffix("") if packed else path).suffix.lower()


def digest_of(source: Path) -> str:
    """sha256 of a file's bytes; of a folder, of the names and digests of its files."""
    if source.is_file():
        return sha256_file(source)
    digest = hashlib.sha256()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(source).as_posix()}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class OpenFile:
    """`stream` gives the unpacked bytes; `position` is how many bytes of the file itself have been read."""

    stream: BinaryIO
    position: Callable[[], int]


@contextmanager
def open_file(path: Path) -> Iterator[OpenFile]:
    """Raises `InvalidData` while reading when the packing is broken or hides far more than it seems."""
    with path.open("rb") as raw:
        match path.suffix.lower():
            case ".gz":
                unpacked: Any = gzip.GzipFile(fileobj=raw, mode="rb")
            case ".zst":
                unpacked = open_zstandard(path, raw)
            case _:
                yield OpenFile(raw, raw.tell)
                return
        guarded = Unpacked(path, unpacked, raw)
        with io.BufferedReader(guarded, 1024 * 1024) as stream:
            yield OpenFile(cast(BinaryIO, stream), raw.tell)


def open_zstandard(path: Path, raw: BinaryIO) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise MissingExtra(f"reading {path.name}, packed by zstd,", "data") from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


class Unpacked(io.RawIOBase):
    """The unpacked bytes of a file, with clear errors; a small file that unpacks to a huge one is refused."""

    def __init__(self, path: Path, unpacked: Any, raw: BinaryIO) -> None:
        self.path = path
        self.unpacked = unpacked
        self.raw = raw
        self.count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        kind = {".gz": "gzip", ".zst": "zstd"}[self.path.suffix.lower()]
        try:
            data = self.unpacked.read(len(buffer))
        except (EOFError, OSError, zlib.error) as error:
            raise InvalidData(
                f"{self.path} is not a whole {kind} file: {error}", hint="copy or download it again"
            ) from error
        self.count += len(data)
        if self.count > BOMB_BYTES and self.count > BOMB_RATIO * self.raw.tell():
            raise InvalidData(
                f"{self.path} unpacks to more than {BOMB_RATIO} times its size, which text does not",
                hint=f"if it is what you expect, unpack it first: {'gunzip' if kind == 'gzip' else 'unzstd'} {self.path}",
            )
        buffer[: len(data)] = data
        return len(data)
