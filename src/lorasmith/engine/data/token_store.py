"""Tokenised rows on disk: ids and labels in flat files that are memory-mapped, whole or absent.

```
train-8d1c…/            of the part `train`, under the key of what made it
├─ tokens.bin           uint32 of all rows, one after the other; the highest bit says that the token is trained
├─ rows.bin             `ROW` of each row
├─ origin.json          what the key is the digest of
└─ manifest.json        sha256 of each file
```
While it is written it is `train-8d1c….partial` with a journal: a chunk whose checksums are right is not made again.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.errors import InvalidData
from lorasmith.faults import fault_point
from lorasmith.files import disk_errors, fsync_folder, seal, verify_manifest, write_json
from lorasmith.schemas.data import CheckName

TOKENS, ROWS, ORIGIN, JOURNAL = "tokens.bin", "rows.bin", "origin.json", "journal.jsonl"
PARTIAL = ".partial"
TRAINED = 1 << 31  # of a token; ids are below
CHECK_NAMES: tuple[CheckName, ...] = get_args(CheckName)
CHECK_BITS = 3
ROW = np.dtype(
    [
        ("end", "<u8"),  # tokens of this row and all before it
        ("offset", "<u8"),  # bytes before its line in the file of examples
        ("row", "<u4"),  # input row, counted from 1
        ("trained", "<u4"),  # tokens that carry loss
        ("failed", "<u4"),  # checks that it fails, in their order, `CHECK_BITS` each
    ]
)


def packed_checks(names: Sequence[CheckName]) -> int:
    """The names in order as one number, 0 for none.

    >>> checks_of(packed_checks(["special-token-in-message", "stop-token-not-trained"]))
    ('special-token-in-message', 'stop-token-not-trained')
    """
    return sum(CHECK_NAMES.index(name) + 1 << CHECK_BITS * place for place, name in enumerate(names))


def checks_of(packed: int) -> tuple[CheckName, ...]:
    names = []
    while packed:
        names.append(CHECK_NAMES[packed % (1 << CHECK_BITS) - 1])
        packed >>= CHECK_BITS
    return tuple(names)


def flat(rows: Sequence[RenderedExample]) -> NDArray[np.uint32]:
    """Ids (T,) of all rows, one after the other, with `TRAINED` on those that are trained."""
    ids = array("I")
    for row in rows:
        ids.fromlist(row.ids)  # a quarter of the time of one pass over all of them in numpy
    tokens = np.frombuffer(ids, np.uint32).copy()
    tokens[np.frombuffer(b"".join([bytes(row.trained) for row in rows]), bool)] |= np.uint32(TRAINED)
    return tokens


def trained_counts(tokens: NDArray[np.uint32], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Per row (rows,) the tokens that carry loss; the first token of a row has nothing before it."""
    flags = tokens >= TRAINED
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(flags)])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    counts: NDArray[np.int64] = before[ends] - before[np.minimum(starts + 1, ends)]
    return counts


def rendered(tokens: NDArray[np.uint32], row: int, overridden: tuple[CheckName, ...]) -> RenderedExample:
    return RenderedExample(row, (tokens & np.uint32(TRAINED - 1)).tolist(), (tokens >= TRAINED).tolist(), overridden)


def store_bytes(lengths: NDArray[np.int64]) -> int:
    """Of the store of rows with so many tokens each, without its small files."""
    return int(lengths.sum()) * np.dtype("<u4").itemsize + len(lengths) * ROW.itemsize


class TokenStore:
    """Rows as they were rendered with every check overridden: which checks a row fails stands in `failed`.

    `lengths`, `trained` and `failed` (rows,) are in memory, the tokens are not.
    """

    def __init__(self, folder: Path) -> None:
        """Raises `InvalidData` when the folder is damaged."""
        verify_manifest(folder)
        self.folder = folder
        self.tokens: NDArray[np.uint32] = mapped(folder / TOKENS, np.dtype("<u4"))
        index = mapped(folder / ROWS, ROW)
        self.ends = np.concatenate([np.zeros(1, np.int64), index["end"].astype(np.int64)])
        if self.ends[-1] != len(self.tokens):
            raise InvalidData(
                f"{folder} is damaged: {ROWS} counts {self.ends[-1]} tokens, there are {len(self.tokens)}"
            )
        self.lengths: NDArray[np.int64] = np.diff(self.ends)
        self.trained: NDArray[np.int64] = index["trained"].astype(np.int64)
        self.failed: NDArray[np.int64] = index["failed"].astype(np.int64)
        self.numbers: NDArray[np.int64] = index["row"].astype(np.int64)
        self.offsets: NDArray[np.int64] = index["offset"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, index: int) -> RenderedExample:
        tokens = self.tokens[self.ends[index] : self.ends[index + 1]]
        return rendered(tokens, int(self.numbers[index]), checks_of(int(self.failed[index])))


def mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(path, dtype, mode="r"))


@dataclass(frozen=True)
class Chunk:
    """Rows that were tokenised together, and where the line behind the last of them begins.

    `tokens` (T,) as `flat` gives them; `index` (rows,) of `ROW`, whose `end` counts from the first token of the chunk.
    """

    tokens: NDArray[np.uint32]
    index: NDArray[Any]
    next_offset: int


def chunk_of(rows: Sequence[RenderedExample], offsets: Sequence[int], next_offset: int) -> Chunk:
    """`offsets` (rows,): bytes before the line of each."""
    tokens = flat(rows)
    lengths = np.array([len(row.ids) for row in rows], np.int64)
    index = np.zeros(len(rows), ROW)
    index["end"] = np.cumsum(lengths)
    index["offset"] = offsets
    index["row"] = [row.row for row in rows]
    index["trained"] = trained_counts(tokens, lengths)
    index["failed"] = [packed_checks(row.overridden) for row in rows]
    return Chunk(tokens, index, next_offset)


class StoreWriter:
    """Appends chunks to a partial store, after those that an earlier writer left whole."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target.with_name(target.name + PARTIAL)
        self.rows = self.tokens = self.next_offset = 0
        with disk_errors(target):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (TOKENS, ROWS, JOURNAL):
                (self.folder / name).touch()
            self.continue_whole()
            fault_point("tokens.begun")

    def continue_whole(self) -> None:
        """Count the chunks that are whole; the rest, which a crash left, is cut off."""
        tokens, index = (self.folder / name for name in (TOKENS, ROWS))
        journal: list[str] = []
        with tokens.open("rb") as token_bytes, index.open("rb") as row_bytes:
            for line in (self.folder / JOURNAL).read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    entry = json.loads(line)
                    new_tokens, new_rows = entry["tokens"] - self.tokens, entry["rows"] - self.rows
                    read = token_bytes.read(4 * new_tokens), row_bytes.read(ROW.itemsize * new_rows)
                    whole = [zlib.crc32(part) for part in read] == entry["crc32"] and line.endswith("\n")
                except (ValueError, KeyError, TypeError):
                    whole = False
                if not whole:
                    break
                journal.append(line)
                self.rows, self.tokens, self.next_offset = entry["rows"], entry["tokens"], entry["next_offset"]
        for path, size in ((tokens, 4 * self.tokens), (index, ROW.itemsize * self.rows)):
            with path.open("r+b") as handle:
                handle.truncate(size)
        (self.folder / JOURNAL).write_text("".join(journal), encoding="utf-8")

    def append(self, chunk: Chunk) -> None:
        index = chunk.index.copy()
        index["end"] += self.tokens
        parts = [chunk.tokens.astype("<u4").tobytes(), index.tobytes()]
        self.rows += len(index)
        self.tokens += len(chunk.tokens)
        self.next_offset = chunk.next_offset
        entry = {
            "rows": self.rows,
            "tokens": self.tokens,
            "next_offset": self.next_offset,
            "crc32": [zlib.crc32(part) for part in parts],
        }
        with disk_errors(self.folder):
            for name, part in zip((TOKENS, ROWS), parts, strict=True):
                with (self.folder / name).open("ab") as handle:
                    handle.write(part)
            fault_point("tokens.appended")
            with (self.folder / JOURNAL).open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(entry) + "\n")
        fault_point("tokens.journaled")

    def finish(self, origin: dict[str, Any]) -> None:
        """Give the store its name, once every byte is on the disk. `origin` is what it was made from."""
        with disk_errors(self.folder):
            write_json(self.folder / ORIGIN, origin)
            (self.folder / JOURNAL).unlink()
            fault_point("tokens.unjournaled")
            seal(self.folder)
            fault_point("tokens.sealed")
            self.folder.rename(self.target)
            fault_point("tokens.renamed")
            fsync_folder(self.target.parent)
