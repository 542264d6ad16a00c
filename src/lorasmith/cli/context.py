"""What every command gets from the root: the home folder to open and whether to show tracebacks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench


@dataclass(frozen=True)
class Shell:
    """Options of the root command; `home` is None where neither flag nor variable chose one."""

    home: Path | None = None
    debug: bool = False


def open_workbench(context: typer.Context) -> Workbench:
    from lorasmith.services.workbench import Workbench
    from lorasmith.settings import Settings

    shell = context.obj
    assert isinstance(shell, Shell)
    return Workbench.open(Settings.read(shell.home))
