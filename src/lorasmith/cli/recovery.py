"""`lorasmith recover`"""

from __future__ import annotations

from typing import Annotated

import typer

from lorasmith.cli.context import Shell
from lorasmith.cli.output import hint, print_json, print_table


def recover(
    context: typer.Context, as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False
) -> None:
    """Make a damaged database again, from what can be read of it, its newest backup and the folders on disk"""
    from lorasmith.services.recovery import NOUNS
    from lorasmith.services.recovery import recover as recover_home
    from lorasmith.settings import Settings

    shell = context.obj
    assert isinstance(shell, Shell)
    found = recover_home(Settings.read(shell.home))
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    sources = (found.from_database, found.from_backup, found.from_folders)
    rows = [[table, *(source.get(table, 0) for source in sources)] for table in NOUNS]
    print_table(["rows", "from the database", "from its backup", "from folders"], rows)
    for problem in found.problems:
        hint(f"found: {problem}")
    for left in found.left_out:
        hint(f"left out: {left}")
    hint(f"the database that was there is kept in {found.kept_aside}" if found.kept_aside else "the database is whole")
