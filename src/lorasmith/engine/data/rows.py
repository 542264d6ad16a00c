"""Rows that were rendered, in memory or in a token store, and those of them that a run computes with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, overload

import numpy as np
from numpy.typing import NDArray

from lorasmith.engine.data.examples import parse_example
from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.data.token_store import TokenStore, flat, packed_checks, rendered
from lorasmith.schemas.data import Example


class Rows(Protocol):
    """Every row of a part as it was rendered with all checks overridden.

    Per row (rows,): `lengths` in tokens, `trained` tokens, and in `failed` not 0 where it fails a check.
    """

    lengths: NDArray[np.int64]
    trained: NDArray[np.int64]
    failed: NDArray[np.int64]

    def row(self, index: int) -> RenderedExample: ...

    def example(self, index: int) -> Example:
        """What the row was rendered from."""
        ...


class RowsInMemory:
    def __init__(self, examples: Sequence[Example], rows: Sequence[RenderedExample]) -> None:
        self.examples, self.rows = examples, rows
        self.lengths = np.array([len(row.ids) for row in rows], np.int64)
        self.trained = np.array([row.trained_tokens for row in rows], np.int64)
        self.failed = np.array([packed_checks(row.overridden) for row in rows], np.int64)

    def row(self, index: int) -> RenderedExample:
        return self.rows[index]

    def example(self, index: int) -> Example:
        return self.examples[index]


class StoredRows:
    """Of a token store; `examples_file` is what it was made from."""

    def __init__(self, store: TokenStore, examples_file: Path) -> None:
        self.store, self.examples_file = store, examples_file
        self.lengths, self.trained, self.failed = store.lengths, store.trained, store.failed

    def row(self, index: int) -> RenderedExample:
        return self.store.row(index)

    def example(self, index: int) -> Example:
        with self.examples_file.open("rb") as handle:
            handle.seek(int(self.store.offsets[index]))
            return parse_example(handle.readline(), self.examples_file, index + 1)


def row_lengths(rows: Sequence[RenderedExample]) -> list[int]:
    """In tokens, without making lists of stored rows."""
    return rows.lengths.tolist() if isinstance(rows, ChosenRows) else [len(row.ids) for row in rows]


class ChosenRows(Sequence[RenderedExample]):
    """Some of the rows in some order: index i is row i, -1 - n is piece n, of a row that was too long.

    `lengths` and `trained` (chosen rows,) count tokens. A stored row is made into lists each time it is asked for.
    """

    def __init__(self, rows: Rows, indices: NDArray[np.int64], pieces: Sequence[RenderedExample]) -> None:
        self.rows, self.indices = rows, indices
        self.pieces = [(flat([piece]), piece.row, piece.overridden) for piece in pieces]
        whole = indices >= 0
        of_pieces = -1 - indices[~whole]
        self.lengths = np.zeros(len(indices), np.int64)
        self.trained = np.zeros(len(indices), np.int64)
        for counts, of_rows, of_piece in (
            (self.lengths, rows.lengths, [len(piece.ids) for piece in pieces]),
            (self.trained, rows.trained, [piece.trained_tokens for piece in pieces]),
        ):
            counts[whole] = of_rows[indices[whole]]
            counts[~whole] = np.array(of_piece, np.int64)[of_pieces]

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, place: int) -> RenderedExample: ...

    @overload
    def __getitem__(self, place: slice) -> list[RenderedExample]: ...

    def __getitem__(self, place: int | slice) -> RenderedExample | list[RenderedExample]:
        if isinstance(place, slice):
            return [self[index] for index in range(*place.indices(len(self)))]
        index = int(self.indices[place])
        return self.rows.row(index) if index >= 0 else rendered(*self.pieces[-1 - index])
