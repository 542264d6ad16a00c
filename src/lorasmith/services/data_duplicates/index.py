"""What a search remembers about its rows, on disk: digests, shingles and signatures, never the texts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.files import disk_errors, read_json, staged_folder, write_json
from lorasmith.services.data_duplicates.parallel import Workers
from lorasmith.services.data_duplicates.shingles import I64, U64, Ragged, Shingling, offsets_of, shingles_of
from lorasmith.services.data_duplicates.signatures import PERMUTATIONS, SEED, Signatures, signatures_of
from lorasmith.services.data_duplicates.texts import KEYS, Key, Row, digest, folded

VERSION = 1
DESCRIPTION = "index.json"
ROWS_AT_ONCE = 2048
CHARACTERS_AT_ONCE = 1 << 20  # hashing a character takes about 40 bytes for a moment

ROW = np.dtype(
    [
        ("id", "<i8"),
        ("item", "<u8", (2,)),  # digest of the text that is compared
        ("instruction", "<u8"),
        ("answer", "<u8"),
        ("answer_length", "<u4"),  # characters, folded
        ("text_length", "<u4"),
        ("shingle_count", "<u4"),
        ("instruction_shingles", "<u4"),
    ]
)
ROWS, SIGNATURES, SHINGLES, BEST = "rows", "signatures", "shingles", "best"


class Prepared(NamedTuple):
    rows: NDArray[np.void]
    signatures: Signatures
    shingles: U64


@dataclass(frozen=True)
class Index:
    """An index folder, opened: one entry for each row in the order in which they came; arrays are memory-mapped."""

    folder: Path
    key: Key
    shingling: Shingling
    num_rows: int
    id: NDArray[np.int64]
    instruction: U64
    answer: U64
    answer_length: NDArray[np.uint32]
    text_length: NDArray[np.uint32]
    instruction_shingles: NDArray[np.uint32]  # distinct ones that end in the instruction
    best: I64  # the best row with the same text
    signatures: Signatures
    shingles: Ragged

    def candidates_of(self) -> I64:
        """Positions that are compared: the best row of each text that has shingles, ascending."""
        return np.flatnonzero((self.best == np.arange(self.num_rows)) & (self.shingles.lengths() > 0))


def write_index(
    rows: Iterable[Row],
    folder: Path,
    *,
    key: Key = "whole",
    shingling: Shingling | None = None,
    processes: int | None = None,
    replace: bool = False,
) -> Index:
    """Hash the rows into a new folder; it takes about 1 KB a row. Ids must be different whole numbers.

    Without `processes` every core is used once there is work for them; the result does not depend on their number.
    Raises `InvalidSpec`, `InvalidData` for an id that is there twice, `Conflict` when the folder exists, `DiskFull`.
    """
    if key not in KEYS:
        raise InvalidSpec(f"rows are compared by one of {', '.join(KEYS)}, got {key!r}")
    shingling = shingling or Shingling()
    with staged_folder(folder, replace=replace) as staging:
        num_rows = 0
        with ExitStack() as stack, Workers(processes) as workers, disk_errors(folder):
            row_file, signature_file, shingle_file = (
                stack.enter_context((staging / name).open("wb")) for name in (ROWS, SIGNATURES, SHINGLES)
            )
            for prepared in workers.map(partial(prepare, key=key, shingling=shingling), chunks(rows)):
                row_file.write(prepared.rows.tobytes())  # `tofile` hides that a disk is full
                signature_file.write(prepared.signatures.tobytes())
                shingle_file.write(prepared.shingles.tobytes())
                num_rows += len(prepared.rows)
        written = np.fromfile(staging / ROWS, ROW)
        reject_repeated_ids(written["id"])
        (staging / BEST).write_bytes(best_of_items(written).tobytes())
        description = {"version": VERSION, "key": key, "shingling": asdict(shingling), "num_rows": num_rows}
        write_json(staging / DESCRIPTION, {**description, "permutations": PERMUTATIONS, "seed": SEED})
    return open_index(folder)


def open_index(folder: Path) -> Index:
    """Raises `NotFound` when there is none, `InvalidData` for one of another version or with missing bytes."""
    description = read_json(folder / DESCRIPTION)
    made = (description.get("version"), description.get("permutations"), description.get("seed"))
    if made != (VERSION, PERMUTATIONS, SEED):
        raise InvalidData(
            f"{folder} holds an index of version {made[0]}, this program reads version {VERSION}",
            hint="search again from the rows",
        )
    num_rows = int(description["num_rows"])
    rows = mapped(folder / ROWS, ROW, (num_rows,))
    offsets = offsets_of(rows["shingle_count"])
    return Index(
        folder=folder,
        key=description["key"],
        shingling=Shingling(**description["shingling"]),
        num_rows=num_rows,
        id=rows["id"],
        instruction=rows["instruction"],
        answer=rows["answer"],
        answer_length=rows["answer_length"],
        text_length=rows["text_length"],
        instruction_shingles=rows["instruction_shingles"],
        best=mapped(folder / BEST, np.dtype("<i8"), (num_rows,)),
        signatures=mapped(folder / SIGNATURES, np.dtype("<u2"), (num_rows, PERMUTATIONS)),
        shingles=Ragged(mapped(folder / SHINGLES, np.dtype("<u8"), (int(offsets[-1]),)), offsets),
    )


def mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        raise InvalidData(
            f"{path} should hold {expected} bytes, found {'no file' if found is None else found}",
            hint="search again from the rows",
        )
    return np.memmap(path, dtype, "r", shape=shape) if expected else np.zeros(shape, dtype)


def reject_repeated_ids(ids: NDArray[np.int64]) -> None:
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        repeated = values[counts > 1]
        raise InvalidData(f"row id {repeated[0]} is there {counts.max()} times; each row needs an id of its own")


def best_first(answer_length: NDArray[np.uint32], text_length: NDArray[np.uint32]) -> I64:
    """Positions from the best row on: the longest answer, then the longest text, then the earliest."""
    return np.lexsort((-text_length.astype(np.int64), -answer_length.astype(np.int64)))  # stable, so earliest first


def best_of_items(rows: NDArray[np.void]) -> I64:
    """For each row the position of the best row whose compared text is equal."""
    item = rows["item"]
    ranked = best_first(rows["answer_length"], rows["text_length"])
    order = ranked[np.lexsort((item[ranked, 1], item[ranked, 0]))]
    begins = np.append(True, (item[order[1:]] != item[order[:-1]]).any(axis=1))[: len(order)]
    best = np.empty(len(order), np.int64)
    best[order] = order[begins][np.cumsum(begins) - 1]
    return best


def chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(row.instruction) + len(row.answer)
        if len(chunk) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def compared_text(instruction: str, answer: str, key: Key) -> str:
    """The text that stands for a row. White space at the seam is one line break, whatever the texts are."""
    return {
        "whole": f"{instruction}\n{answer}" if answer else instruction,
        "instruction": instruction,
        "answer": answer,
    }[key]


def prepare(rows: Sequence[Row], key: Key, shingling: Shingling) -> Prepared:
    """What the index holds of one chunk."""
    instructions = [folded(row.instruction) for row in rows]
    answers = [folded(row.answer) for row in rows]
    texts = [compared_text(*pair, key) for pair in zip(instructions, answers, strict=True)]
    shingles, instruction_shingles = shingles_of(texts, shingling, list(map(len, instructions)))
    prepared = np.empty(len(rows), ROW)
    prepared["id"] = [row.id for row in rows]
    prepared["item"] = np.frombuffer(b"".join(map(digest, texts)), "<u8").reshape(-1, 2)
    prepared["instruction"] = short_digests(instructions)
    prepared["answer"] = short_digests(answers)
    prepared["answer_length"] = list(map(len, answers))
    prepared["text_length"] = list(map(len, texts))
    prepared["shingle_count"] = shingles.lengths()
    prepared["instruction_shingles"] = instruction_shingles
    return Prepared(prepared, signatures_of(shingles), shingles.values)


def short_digests(texts: Sequence[str]) -> U64:
    return np.frombuffer(b"".join(digest(text, 8) for text in texts), "<u8")
