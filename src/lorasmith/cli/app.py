"""`lorasmith`: the root command, its options, and how errors are shown. Starting it loads no torch."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lorasmith.cli import (
    adapters,
    data,
    demo,
    doctor,
    estimation,
    evaluation,
    jobs,
    models,
    recovery,
    secrets,
    server,
    serving,
    training,
    worker,
)
from lorasmith.cli.context import Shell
from lorasmith.cli.output import console_err
from lorasmith.errors import LorasmithError


class Commands(TyperGroup):
    """Shows a `LorasmithError` as one sentence and a hint, with its exit code; a traceback only with --debug."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LorasmithError as error:
            if ctx.params.get("debug"):
                raise
            show_error(error)
            raise typer.Exit(error.exit_code) from error
        except OSError as error:
            if ctx.params.get("debug") or error.errno == errno.EPIPE:  # nobody reads on, as behind `| head`
                raise
            named = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
            show_error(LorasmithError(named, hint="lorasmith --debug shows where"))
            raise typer.Exit(LorasmithError.exit_code) from error
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


def show_error(error: LorasmithError) -> None:
    from rich.markup import escape

    console = console_err()
    console.print(f"[bold red]error:[/bold red] {escape(error.message)}", soft_wrap=True)
    if error.hint:
        console.print(f"\n[bold]hint:[/bold] {escape(error.hint)}", soft_wrap=True)


app = typer.Typer(
    name="lorasmith",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"lorasmith {version('lorasmith')}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    home: Annotated[Path | None, typer.Option(help="Data directory; default LORASMITH_HOME or ~/.lorasmith")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks")] = False,
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version and exit", callback=show_version, is_eager=True)
    ] = False,
) -> None:
    """Train, measure, export and talk to LoRA adapters, on the machine that you have"""
    context.obj = Shell(home=home, debug=debug)


app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
app.command("estimate")(estimation.estimate)
app.command("train")(training.train)
app.command("eval")(evaluation.evaluate)
app.add_typer(adapters.app, name="adapters")
app.add_typer(adapters.export_app, name="export")
app.command("test")(serving.test)
app.command("chat")(serving.chat)
app.add_typer(jobs.app, name="jobs")
app.command("serve")(server.serve)
app.command("api-token")(server.show_token)
app.add_typer(secrets.app, name="secrets")
app.command("worker")(worker.worker)
app.command("doctor")(doctor.doctor)
app.command("recover")(recovery.recover)


def open_closed_streams() -> None:
    """A stream that the shell has closed (`>&-`) leads nowhere; else the next open file, as the database, gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def main() -> None:
    open_closed_streams()
    app()
