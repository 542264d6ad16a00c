"""`lorasmith secrets`"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import hint, print_json, print_table

app = typer.Typer(help="Keys of other services, kept encrypted", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the secret")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]


@app.command("set")
def set_(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Keep a value, which is asked for, or read from standard input where that is no terminal"""
    from lorasmith.services.secrets import set_secret

    home = open_workbench(context).home
    if sys.stdin.isatty():
        value = typer.prompt(f"value of {name}", hide_input=True, err=True)
    else:
        value = sys.stdin.read().rstrip("\r\n")
    secret = set_secret(home, name, value)
    if as_json:
        print_json(secret.model_dump(mode="json"))
    else:
        hint(f"{name} is kept in the {secret.kept_in}")


@app.command("list")
def list_(context: typer.Context, as_json: AsJson = False) -> None:
    """List the names of secrets"""
    from lorasmith.services.secrets import list_secrets

    secrets = list_secrets(open_workbench(context).home)
    if as_json:
        print_json([secret.model_dump(mode="json") for secret in secrets])
        return
    rows = [[secret.name, secret.kept_in, f"{secret.updated_at:%Y-%m-%d %H:%M}"] for secret in secrets]
    print_table(["name", "kept in", "set"], rows)
    if not secrets:
        hint("no secrets yet: lorasmith secrets set NAME")


@app.command("rm")
def remove(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Remove a secret"""
    from lorasmith.services.secrets import remove_secret

    secret = remove_secret(open_workbench(context).home, name)
    if as_json:
        print_json({"removed": secret.name})
    else:
        hint(f"removed {secret.name}")
