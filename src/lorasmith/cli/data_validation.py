"""`lorasmith data validate`: a line for each finding, then the counts; the status says whether an import would succeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.data_options import (
    AsJson,
    Columns,
    Encoding,
    Format,
    Languages,
    MaxChars,
    MaxRejected,
    Mending,
    MinChars,
    Rejecting,
    Strict,
    Tokenizer,
    row_checks,
    validation_spec,
)
from lorasmith.cli.data_view import counts, show_fields, visible
from lorasmith.cli.output import print_json
from lorasmith.errors import InvalidData

if TYPE_CHECKING:
    from lorasmith.schemas.validation import RowFinding, Validation


def validate(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="What an import takes, or the name of a dataset")],
    format: Format = "auto",
    max_rejected: MaxRejected = 0.0,
    strict: Strict = False,
    map: Columns = None,
    encoding: Encoding = None,
    mend: Mending = None,
    reject: Rejecting = None,
    min_chars: MinChars = None,
    max_chars: MaxChars = None,
    language: Languages = None,
    tokenizer: Tokenizer = None,
    as_json: AsJson = False,
) -> None:
    """Check rows as an import would, and import nothing"""
    from lorasmith.cli.data_progress import ImportView
    from lorasmith.services.data_validation import validate_data

    checks = row_checks(
        strict=strict,
        columns=map,
        encoding=encoding,
        mend=mend,
        reject=reject,
        min_chars=min_chars,
        max_chars=max_chars,
        languages=language,
        tokenizer=tokenizer,
    )
    spec = validation_spec(format, max_rejected, checks)
    found: list[RowFinding] = []
    with ImportView() as view:
        result = validate_data(open_workbench(context), source, spec, found.append if as_json else print_finding, view)
    if as_json:
        print_json({**result.model_dump(mode="json"), "findings": [one.model_dump(mode="json") for one in found]})
    else:
        show_validation(result)
    if not result.passes:
        raise InvalidData(result.error or "", hint=result.hint)


def print_finding(finding: RowFinding) -> None:
    """`rows.csv:3: row 2, field `output`: found 1 characters, expected at least 3 (too-short, rejected)`."""
    place = finding.file if finding.line is None else f"{finding.file}:{finding.line}"
    fate = ", rejected" if finding.rejected else ""
    text = f"{place}: row {finding.row}, {finding.sentence()} ({finding.check}{fate})"
    typer.echo(visible(text))


def show_validation(result: Validation) -> None:
    fields = {"source": result.source}
    if result.format is not None:
        fields["format"] = f"{result.format}, because {result.format_reason}"
    fields["rows"] = counts(result.fates)
    fields["findings"] = counts(result.counts) or "none"
    fields["import"] = "would succeed" if result.passes else "would stop"
    show_fields(fields)
