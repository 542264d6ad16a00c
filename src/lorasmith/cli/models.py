"""`lorasmith models`"""

from __future__ import annotations

from typing import Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import hint, print_json, print_table, size

app = typer.Typer(help="Base models", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]


@app.command("list")
def list_models(context: typer.Context, as_json: AsJson = False) -> None:
    """List the built-in and the registered base models"""
    from lorasmith.services import models

    entries = models.list_models(open_workbench(context))
    if as_json:
        print_json([entry.model_dump(mode="json") for entry in entries])
        return
    rows = []
    for entry in entries:
        facts = entry.facts
        about = (
            [facts.model_type, f"{facts.parameters / 1e6:,.1f} M", size(facts.weights_bytes), str(facts.context_tokens)]
            if facts
            else ["not fetched yet", "", "", ""]
        )
        rows.append([entry.name, entry.source, *about])
    print_table(["name", "source", "type", "parameters", "weights", "context"], rows)


@app.command("add")
def add_model(
    context: typer.Context,
    location: Annotated[str, typer.Argument(help="A model folder or a hub id")],
    name: Annotated[str | None, typer.Option(help="Name to use for it")] = None,
    as_json: AsJson = False,
) -> None:
    """Register a model folder or a hub id under a name"""
    from lorasmith.services import models

    entry = models.add_model(open_workbench(context), location, name)
    if as_json:
        print_json(entry.model_dump(mode="json"))
        return
    print(f"model {entry.name}: {entry.location}")
    hint(f"next: lorasmith train --model {entry.name} --data DATASET")


@app.command("show")
def show_model(context: typer.Context, name: str, as_json: AsJson = False) -> None:
    """Show what a base model is"""
    from lorasmith.services import models

    entry = models.show_model(open_workbench(context), name)
    if as_json:
        print_json(entry.model_dump(mode="json"))
        return
    values = {"name": entry.name, "source": entry.source, "location": entry.location}
    values |= {key: str(value) for key, value in (entry.facts.model_dump() if entry.facts else {}).items()}
    print_table(["", entry.name], values.items())
