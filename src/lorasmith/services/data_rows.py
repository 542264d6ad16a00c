"""What every reader yields: a row as it stands in the file, or why there is none."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from lorasmith.errors import InvalidData
from lorasmith.schemas.data import Example, Part


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in the file. `number` counts rows from 1; `line` is where the row begins, if it has one.

    `file` is the name that the ledger uses; `part` is what the file's name says about the row; `example` is there for a
    row that was converted before.
    """

    number: int
    line: int | None
    values: dict[str, Any]
    file: str = field(default="", compare=False)
    part: Part | None = field(default=None, compare=False)
    example: Example | None = field(default=None, compare=False)


class Library(Protocol):
    """Rows that are kept by something else than files of rows."""

    def files(self) -> list[Path]: ...

    def rows(self) -> Iterator[RawRow]: ...


@dataclass(frozen=True)
class BrokenRow:
    """A row that cannot be read, in a file that can be read behind it."""

    path: Path
    number: int
    line: int
    found: str
    expected: str
    hint: str
    file: str = ""

    @property
    def sentence(self) -> str:
        return f"{self.found}, expected {self.expected}"

    def error(self) -> InvalidData:
        return InvalidData(f"{self.path}:{self.line}: {self.sentence}", hint=self.hint)


def short_json(value: Any) -> str:
    try:
        return json.dumps(value)[:60]
    except (RecursionError, ValueError, TypeError):
        return f"a {type(value).__name__}"
