"""`lorasmith data validate`: a line for each finding, then the counts; the status says whether an import would succeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.data_options import FORMATS, MENDS, limits, validation_spec
from lorasmith.cli.data_view import counts, show_fields, visible
from lorasmith.cli.output import print_json
from lorasmith.errors import InvalidData

if TYPE_CHECKING:
    from lorasmith.schemas.validation import RowFinding, Validation


def validate(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="What an import takes, or the name of a dataset")],
    format: Annotated[str, typer.Option("--format", help=f"Row format: {FORMATS}")] = "auto",
    max_rejected: Annotated[float, typer.Option("--max-rejected", help="Allowed share of bad rows, from 0 to 1")] = 0.0,
    strict: Annotated[bool, typer.Option("--strict", help="Any finding fails")] = False,
    map: Annotated[list[str] | None, typer.Option("--map", help="Columns: instruction=question,output=answer")] = None,
    encoding: Annotated[str | None, typer.Option("--encoding", help="Encoding of a CSV file")] = None,
    mend: Annotated[list[str] | None, typer.Option("--mend", help=f"As if mended: {MENDS}")] = None,
    reject: Annotated[list[str] | None, typer.Option("--reject", help="Reject rows with a finding, by name")] = None,
    min_chars: Annotated[list[str] | None, typer.Option("--min-chars", help="Least length: output=3")] = None,
    max_chars: Annotated[list[str] | None, typer.Option("--max-chars", help="Greatest length: output=8000")] = None,
    language: Annotated[list[str] | None, typer.Option("--language", help="Flag answers in another, as en")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Flag rows over this model's context")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON")] = False,
) -> None:
    """Check rows as an import would, and import nothing"""
    from lorasmith.cli.data_progress import ImportView
    from lorasmith.services.data_mapping import parse_mapping
    from lorasmith.services.data_validation import validate_data

    checks = {
        "strict": strict,
        "column_map": parse_mapping(map or []),
        "encoding": encoding,
        "mend": mend or [],
        "reject": reject or [],
        "min_chars": limits("--min-chars", min_chars or []),
        "max_chars": limits("--max-chars", max_chars or []),
        "languages": language or [],
        "tokenizer": tokenizer,
    }
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
