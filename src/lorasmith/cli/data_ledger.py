"""`lorasmith data ledger`: what became of each row, in the dataset and in training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.data_options import Allow, AsJson, MaxSeqLength, Name, Template, TooLong, known_fate, known_finding
from lorasmith.cli.data_view import counts, show_fields, visible, why
from lorasmith.cli.output import hint, print_json, print_table
from lorasmith.errors import InvalidSpec

if TYPE_CHECKING:
    from lorasmith.schemas.data import LedgerLine
    from lorasmith.schemas.data_ledger import LedgerSummary
    from lorasmith.services.data_ledger import TrainingLedger
    from lorasmith.services.workbench import Workbench

COLUMNS = ("row", "file", "line", "fate", "part", "example", "reason")
HOW_TO_ASK = "--model M and as in train --too-long right, or --job JOB of a run"


def ledger(
    context: typer.Context,
    name: Name,
    fate: Annotated[str | None, typer.Option("--fate", help="Lines of one fate, such as rejected or cut")] = None,
    flag: Annotated[str | None, typer.Option("--flag", help="Lines with one finding, such as secret")] = None,
    summary: Annotated[bool, typer.Option("--summary", help="Count the rows of each fate instead")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="What training it cuts and leaves out")] = None,
    job: Annotated[str | None, typer.Option("--job", help="What that training job cuts and leaves out")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="Of the run, as in train")] = None,
    template: Template = None,
    max_seq_length: MaxSeqLength = None,
    too_long: TooLong = None,
    allow: Allow = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write JSON Lines to this file instead")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what became of each input row, and with --model or --job what training makes of it"""
    from lorasmith.services.data import check_fate, chosen_lines, ledger_lines, save_ledger
    from lorasmith.services.data_ledger import ledger_summary

    wanted, flagged = known_fate(fate), known_finding(flag)
    if summary and (wanted or flagged or output):
        raise InvalidSpec("--summary counts all rows and writes no file", hint="leave out --fate, --flag and --output")
    settings = {"max_seq_length": max_seq_length, "too_long": too_long, "allow": allow}
    run = {
        "model": model,
        "preset": preset,
        "template": template,
        "training": {key: value for key, value in settings.items() if value is not None} or None,
    }
    asked = {key: value for key, value in run.items() if value is not None}
    check_combination(asked, job)
    if not (model or job):
        check_fate(wanted)
    workbench = open_workbench(context)
    training = asked_training(workbench, name, asked, job)
    if summary:
        show_summary(ledger_summary(workbench, name, training), as_json)
        return
    lines: Iterable[LedgerLine] = ledger_lines(workbench, training.dataset.id if training else name)
    chosen = chosen_lines(training.lines(lines) if training else lines, wanted, flagged)
    if output is not None:
        save_ledger(chosen, output)
        hint(f"written to {output}")
    elif as_json:
        print_json([line.model_dump(mode="json", exclude_none=True) for line in chosen])
    else:
        show_lines(chosen)
    if training is not None and training.found.stops is not None:
        hint(f"training would not start: {training.found.stops}")


def check_combination(asked: dict[str, Any], job: str | None) -> None:
    if job is not None and asked:
        raise InvalidSpec("--job names a run, which has a model and settings of its own", hint="give --job alone")
    if job is None and asked and "model" not in asked:
        raise InvalidSpec("how rows are trained is asked of a model", hint=HOW_TO_ASK)


def asked_training(workbench: Workbench, name: str, asked: dict[str, Any], job: str | None) -> TrainingLedger | None:
    from lorasmith.cli.watching import JobView
    from lorasmith.services.data_ledger import ledger_of_job, training_ledger

    if job is None and not asked:
        return None
    with JobView("ledger") as view:
        if job is not None:
            return ledger_of_job(workbench, name, job, view)
        return training_ledger(workbench, name, asked, view)


def show_lines(lines: Iterable[LedgerLine]) -> None:
    rows = ([line.row, line.file, line.line, line.fate, line.part, line.example_id, why(line)] for line in lines)
    print_table(COLUMNS, (["" if value is None else visible(str(value)) for value in row] for row in rows))


def show_summary(found: LedgerSummary, as_json: bool) -> None:
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    fields = {"dataset": found.dataset, "rows": str(found.rows), "fates": counts(found.fates)}
    if found.max_tokens is not None:
        fields["limit"] = f"{found.max_tokens} tokens, longer rows: {found.too_long}"
        fields["cut"] = f"{found.cut_tokens} tokens"
        fields["starts"] = f"no: {found.stops}" if found.stops else "yes"
    show_fields(fields)
