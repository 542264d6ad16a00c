"""`lorasmith doctor`"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lorasmith.cli.context import Shell
from lorasmith.cli.output import print_json, print_table


def doctor(context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False) -> None:
    """Show what is installed, what is missing and how to get it"""
    from lorasmith.services.doctor import examine
    from lorasmith.settings import Settings

    shell = context.obj
    assert isinstance(shell, Shell)
    findings = examine(Settings.read(shell.home).home)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(["", "state", "", "way out"], [[f.what, f.state, f.detail, f.way_out] for f in findings])
    if any(finding.state == "broken" for finding in findings):
        raise typer.Exit(1)
