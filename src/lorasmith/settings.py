"""`LORASMITH_*` variables, read once by the shells and passed down."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """`home` is the data directory; all rows keep paths relative to it."""

    home: Path

    @classmethod
    def read(cls, home: Path | None = None, environment: Mapping[str, str] = os.environ) -> Settings:
        chosen = home or Path(environment.get("LORASMITH_HOME") or Path.home() / ".lorasmith")
        return cls(home=chosen.expanduser().resolve())
