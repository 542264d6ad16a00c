"""How far an import is, for whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

REPORT_EVERY_ROWS = 500


@dataclass(frozen=True)
class Progress:
    """`done` of `total` bytes of the source while reading, rows afterwards; `rows` is how many were read."""

    phase: Literal["reading", "continuing", "comparing", "writing"]
    done: int
    total: int
    rows: int


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    pass
