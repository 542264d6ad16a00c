"""How a benchmark speaks: JSON lines while it measures, one closing line per bar, and an exit status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


def emit(benchmark: str, **values: Any) -> None:
    """One measurement, one JSON line on stdout."""
    print(json.dumps({"benchmark": benchmark, **values}), flush=True)


@dataclass(frozen=True)
class Bar:
    """A claim and what was measured for it. `ours` and `peer` carry their units; the ratio decides."""

    name: str
    ours: str
    peer: str
    ratio: float
    bar: float
    at_least: bool = True  # else the ratio must not be above the bar
    is_aim: bool = False  # an aim is printed and does not fail the benchmark

    @property
    def short(self) -> bool:
        return not (self.ratio >= self.bar if self.at_least else self.ratio <= self.bar)  # not-a-number is short

    def line(self) -> str:
        sign = ">=" if self.at_least else "<="
        aim = "aim " if self.is_aim else ""
        verdict = "short" if self.short else "ok"
        return f"{self.name}: ours {self.ours} peer {self.peer} ratio {self.ratio:.2f} bar {aim}{sign} {self.bar:g} {verdict}"


def close(bars: list[Bar]) -> int:
    """Print the closing lines; the exit status: 1 when a bar that is no aim is short."""
    for bar in bars:
        print(bar.line(), flush=True)
    return int(any(bar.short and not bar.is_aim for bar in bars))
