"""`lorasmith data`: import, show, preview, explain, prepare and remove datasets."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import hint, print_json, print_table
from lorasmith.errors import InvalidSpec, did_you_mean

if TYPE_CHECKING:
    from lorasmith.schemas.data import (
        DataImportSpec,
        DataPreparationSpec,
        Dataset,
        DatasetFormat,
        Example,
        Fate,
        FindingName,
        LedgerLine,
        Message,
        Part,
    )

app = typer.Typer(help="Import, show and prepare datasets", no_args_is_help=True)

FORMATS = (
    "auto, alpaca, sharegpt, chatml, completion, interactions, chat, classification, summarization, preference or kto"
)
POLICIES = "error, drop, left, right or split"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
File = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE", help="JSON, JSON Lines, CSV or Parquet file, a folder of them, a saved dataset or hub id"
    ),
]
MENDS = "control-characters, mojibake or join-turns"
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the dataset")]
Format = Annotated[str, typer.Option("--format", help=f"Row format: {FORMATS}")]
Split = Annotated[str, typer.Option("--split", help="Shares of train, val and test")]
Salt = Annotated[str, typer.Option("--salt", help="Choose another split by another salt")]
MaxRejected = Annotated[float, typer.Option("--max-rejected", help="Share of bad rows to leave out, from 0 to 1")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]


@app.command("import")
def import_(
    context: typer.Context,
    file: File,
    name: Annotated[str, typer.Option("--name", help="Name of the new dataset")],
    format: Format = "auto",
    split: Split = "80/10/10",
    exact: Annotated[bool, typer.Option("--exact", help="Make the shares exact, for a small set")] = False,
    salt: Salt = "lorasmith",
    max_rejected: MaxRejected = 0.0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first finding")] = False,
    map: Annotated[list[str] | None, typer.Option("--map", help="Columns: instruction=question,output=answer")] = None,
    encoding: Annotated[str | None, typer.Option("--encoding", help="Encoding of a CSV file")] = None,
    mend: Annotated[list[str] | None, typer.Option("--mend", help=f"Change instead of flag: {MENDS}")] = None,
    reject: Annotated[list[str] | None, typer.Option("--reject", help="Reject rows with a finding, by name")] = None,
    min_chars: Annotated[list[str] | None, typer.Option("--min-chars", help="Least length: output=3")] = None,
    max_chars: Annotated[list[str] | None, typer.Option("--max-chars", help="Greatest length: output=8000")] = None,
    language: Annotated[list[str] | None, typer.Option("--language", help="Flag answers in another, as en")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Flag rows over this model's context")] = None,
    as_json: AsJson = False,
) -> None:
    """Import a file as a dataset with train, val and test parts"""
    from lorasmith.cli.data_progress import ImportView
    from lorasmith.services.data_import import import_dataset
    from lorasmith.services.data_mapping import parse_mapping

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
    spec = import_spec(name, format, split, exact, salt, max_rejected, checks)
    with ImportView() as view:
        dataset = import_dataset(open_workbench(context), file, spec, view)
    if as_json:
        print_json(dataset.model_dump(mode="json"))
    else:
        show_fields(summary(dataset))
    if dataset.kind == "sft":
        hint(f"next: lorasmith train --model starter --data {dataset.name} --preset tiny")


@app.command("list")
def list_(context: typer.Context, as_json: AsJson = False) -> None:
    """List the datasets, oldest first"""
    from lorasmith.services.data import list_datasets

    datasets = list_datasets(open_workbench(context))
    if as_json:
        print_json([dataset.model_dump(mode="json") for dataset in datasets])
        return
    columns = ("name", "format", "train", "val", "test", "created", "id")
    print_table(columns, [[d.name, d.format, *sizes(d), f"{d.created_at:%Y-%m-%d %H:%M}", d.id] for d in datasets])
    if not datasets:
        hint("no datasets yet: lorasmith data import FILE --name NAME")


@app.command()
def show(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show a dataset: source, parts, fates of the rows and lengths"""
    from lorasmith.services.data import get_dataset

    dataset = get_dataset(open_workbench(context), name)
    if as_json:
        print_json(dataset.model_dump(mode="json"))
        return
    statistics = dataset.statistics
    lengths = {
        f"{what} characters": ", ".join(f"{key} {value:g}" for key, value in statistics["characters"][what].items())
        for what in ("prompt", "answer")
    }
    turns = f"mean {statistics['turns']['mean']:g}, max {statistics['turns']['max']}"
    show_fields(
        {
            **summary(dataset),
            "turns": turns,
            **lengths,
            "source": dataset.source,
            "source sha256": dataset.source_sha256,
            "sha256": dataset.sha256,
            "id": dataset.id,
        }
    )


@app.command()
def preview(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the dataset, or a file")],
    part: Annotated[str | None, typer.Option("--part", help="train, val or test; without it, train")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Number of examples")] = 3,
    row: Annotated[int | None, typer.Option("--row", min=1, help="Show the example of this input row")] = None,
    rows: Annotated[str | None, typer.Option("--rows", help="Show those of a range of rows, such as 1-5")] = None,
    labels: Annotated[bool, typer.Option("--labels", help="Show which tokens are trained, masked and cut")] = False,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Whose labels: a model, as in train")] = None,
    template: Annotated[str | None, typer.Option("--template", help="Chat template for a base without one")] = None,
    max_seq_length: Annotated[int | None, typer.Option("--max-seq-length", help="Tokens, as in train")] = None,
    too_long: Annotated[str | None, typer.Option("--too-long", help=f"Policy for a longer row: {POLICIES}")] = None,
    allow: Annotated[list[str] | None, typer.Option("--allow", help="Override a check, by name")] = None,
    as_json: AsJson = False,
) -> None:
    """Print examples of a part, or with --labels what a model is trained on"""
    workbench = open_workbench(context)
    known, chosen = known_part(part) if part else None, row_range(row, rows)
    given: dict[str, Any] = {
        "model": model,
        "template": template,
        "max_seq_length": max_seq_length,
        "too_long": too_long,
        "allow": allow or None,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if labels:
        from lorasmith.cli.data_labels import preview_labels

        preview_labels(workbench, {"data": name, "part": known, "rows": chosen, "n": n, **given}, as_json=as_json)
        return
    if given:
        option = next(iter(given)).replace("_", "-")
        raise InvalidSpec(f"--{option} says how a row is labelled, which is shown with --labels", hint="add --labels")
    from lorasmith.services.data_labels import asked_examples

    examples = asked_examples(workbench, name, part=known, rows=chosen, n=n)
    if as_json:
        print_json([example.model_dump(mode="json", exclude_none=True) for example in examples])
        return
    for example in examples:
        show_example(example)
    if not examples:
        hint(f"the part {part or 'train'} of {name} is empty")


@app.command("rm")
def remove(
    context: typer.Context,
    name: Name,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a dataset and its files"""
    from lorasmith.services.data import get_dataset, remove_dataset

    workbench = open_workbench(context)
    dataset = get_dataset(workbench, name)
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidSpec(f"removing {dataset.name!r} needs --yes", hint=f"lorasmith data rm {dataset.name} --yes")
        typer.confirm(f"Remove {dataset.name} with {dataset.num_examples} examples?", abort=True, err=True)
    remove_dataset(workbench, dataset.id)
    if as_json:
        print_json({"removed": dataset.id})
    else:
        hint(f"removed {dataset.name} ({dataset.id})")


@app.command()
def ledger(
    context: typer.Context,
    name: Name,
    fate: Annotated[str | None, typer.Option("--fate", help="Lines of one fate, such as rejected")] = None,
    flag: Annotated[str | None, typer.Option("--flag", help="Lines with one finding, such as secret")] = None,
    output: Annotated[Path | None, typer.Option("--output", help="Write JSON Lines to this file instead")] = None,
    as_json: AsJson = False,
) -> None:
    """Print what became of each input row"""
    from lorasmith.services.data import ledger_lines, save_ledger

    lines = ledger_lines(open_workbench(context), name, known_fate(fate), known_finding(flag))
    if output is not None:
        save_ledger(lines, output)
        hint(f"written to {output}")
        return
    if as_json:
        print_json([line.model_dump(mode="json", exclude_none=True) for line in lines])
        return
    columns = ("row", "file", "line", "fate", "part", "example", "reason")
    rows = ([line.row, line.file, line.line, line.fate, line.part, line.example_id, why(line)] for line in lines)
    print_table(columns, (["" if value is None else visible(str(value)) for value in row] for row in rows))


def why(line: LedgerLine) -> str | None:
    """The reason of a row's fate, how it was changed, and what was found in it."""
    flags = [f"{flag.check}: {flag.sentence()}" for flag in line.flags or ()]
    return "; ".join([*filter(None, [line.reason]), *(line.changes or ()), *flags]) or None


@app.command()
def convert(
    context: typer.Context,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Name of a dataset, or a file, as in import")],
    to: Annotated[str, typer.Option("--to", help="Row format to write, as in import --format")],
    output: Annotated[Path, typer.Option("--output", help="File to write: .jsonl, .json, .csv or .parquet")],
    leave_out: Annotated[bool, typer.Option("--leave-out", help="Leave out rows that the format cannot hold")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the file")] = False,
    as_json: AsJson = False,
) -> None:
    """Write rows in another format"""
    from lorasmith.services.data_writing import convert_rows

    workbench = open_workbench(context)
    result = convert_rows(workbench, source, known_format(to), output, leave_out=leave_out, force=force)
    if as_json:
        print_json({"output": str(output), "written": result.written, "left_out": result.left_out})
        return
    show_fields(
        {
            "file": str(output),
            "rows": str(result.written),
            **{f"left out: {why}": str(count) for why, count in result.left_out.items()},
        }
    )


@app.command()
def prepare(
    context: typer.Context,
    file: File,
    output: Annotated[Path, typer.Option("--output", help="Folder for train, val, test and metadata.json")],
    name: Annotated[str | None, typer.Option("--name", help="Also import it as a dataset of this name")] = None,
    format: Format = "auto",
    split: Split = "80/10/10",
    exact: Annotated[bool, typer.Option("--exact/--no-exact", help="Make the shares exact")] = True,
    salt: Salt = "lorasmith",
    max_rejected: MaxRejected = 0.0,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier run")] = False,
    as_json: AsJson = False,
) -> None:
    """Write collected interactions as ChatML train, val and test files"""
    from lorasmith.services.data_preparation import prepare_and_import, prepare_folder

    if name is None:
        metadata = prepare_folder(file, output, preparation_spec(format, split, exact, salt, max_rejected), force=force)
    else:
        wanted = import_spec(name, format, split, exact, salt, max_rejected)
        metadata = prepare_and_import(open_workbench(context), file, output, wanted, force=force)
    if as_json:
        print_json(metadata)
    else:
        show_fields(
            {
                "format": f"{metadata['format']}, because {metadata['format_reason']}",
                **{f"{part}.jsonl": f"{metadata[f'{part}_examples']} examples" for part in metadata["split"]},
                "rows": counts(metadata["fates"]),
                **({"note": metadata["split_note"]} if metadata["split_note"] else {}),
                "folder": str(output),
            }
        )
    hint(
        f"next: lorasmith train --model starter --data {name} --preset tiny"
        if name
        else "next: the same with --name NAME, to train"
    )


def preparation_spec(format: str, split: str, exact: bool, salt: str, max_rejected: float) -> DataPreparationSpec:
    from lorasmith.schemas.data import DataPreparationSpec

    return DataPreparationSpec.model_validate(checked_options(format, split, exact, salt, max_rejected))


def import_spec(
    name: str,
    format: str,
    split: str,
    exact: bool,
    salt: str,
    max_rejected: float,
    checks: dict[str, Any] | None = None,
) -> DataImportSpec:
    from pydantic import ValidationError

    from lorasmith.schemas.data import DataImportSpec, Mend

    options = {**checked_options(format, split, exact, salt, max_rejected), **(checks or {})}
    for mend in options.get("mend", ()):
        one_of("--mend", mend, get_args(Mend))
    for finding in options.get("reject", ()):
        known_finding(finding, "--reject")
    try:
        return DataImportSpec.model_validate({"name": name, **options})
    except ValidationError:
        raise InvalidSpec(
            f"--name must be 1 to 64 letters, digits, dots, dashes or underscores, and begin with a letter or digit, "
            f"got {name!r}",
            hint="--name support-v1",
        ) from None


def checked_options(format: str, split: str, exact: bool, salt: str, max_rejected: float) -> dict[str, Any]:
    from lorasmith.schemas.data import DatasetFormat

    formats = ["auto", *(format.value for format in DatasetFormat)]
    if format not in formats:
        raise InvalidSpec(f"--format must be {FORMATS}, got {format!r}{did_you_mean(format, formats)}")
    if not 0 <= max_rejected <= 1:
        raise InvalidSpec(
            f"--max-rejected must be a share from 0 to 1, got {max_rejected:g}", hint="--max-rejected 0.05"
        )
    shares = parse_split(split)
    return {"format": format, "split": shares, "exact": exact, "salt": salt, "max_rejected_share": max_rejected}


def limits(option: str, given: list[str]) -> dict[str, int]:
    """`output=3` as {"output": 3}."""
    result: dict[str, int] = {}
    for pair in (piece for text in given for piece in text.split(",")):
        field, _, number = (part.strip() for part in pair.partition("="))
        if not field or not number.isdecimal():
            raise InvalidSpec(f"{option} must be field=characters, got {pair!r}", hint=f"{option} output=3")
        result[field] = int(number)
    return result


def one_of(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidSpec(f"{option} must be {', '.join(known)}, got {value!r}{did_you_mean(value, known)}")


def known_finding(text: str | None, option: str = "--flag") -> FindingName | None:
    from lorasmith.schemas.data import FindingName

    if text is not None:
        one_of(option, text, get_args(FindingName))
    return cast("FindingName | None", text)


def known_format(text: str) -> DatasetFormat:
    from lorasmith.schemas.data import DatasetFormat

    one_of("--to", text, [format.value for format in DatasetFormat])
    return DatasetFormat(text)


def parse_split(text: str) -> tuple[float, ...]:
    """`80/10/10` or `0.8/0.1/0.1` as shares of 1; train must get some."""
    try:
        numbers = [float(number) for number in text.split("/")]
    except ValueError:
        numbers = []
    total = sum(numbers)
    adds_up = min(abs(total - 1), abs(total - 100)) <= 1e-6  # false for a nan
    if len(numbers) != 3 or min(numbers) < 0 or numbers[0] <= 0 or not adds_up:
        raise InvalidSpec(
            f"--split must be three shares that add up to 100, with some for train, got {text!r}",
            hint="--split 80/10/10",
        )
    return tuple(number / total for number in numbers)


def known_part(text: str) -> Part:
    from lorasmith.schemas.data import PARTS

    for part in PARTS:
        if part == text:
            return part
    raise InvalidSpec(f"--part must be train, val or test, got {text!r}{did_you_mean(text, PARTS)}")


def row_range(row: int | None, rows: str | None) -> tuple[int, int] | None:
    """`--row 3` or `--rows 1-5` as first and last row."""
    if row is not None and rows is not None:
        raise InvalidSpec("give --row or --rows, not both")
    if rows is None:
        return None if row is None else (row, row)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", rows.strip())
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise InvalidSpec(
            f"--rows must be two row numbers from 1 up, the first not above the last, got {rows!r}", hint="--rows 1-5"
        )
    return first, last


def known_fate(text: str | None) -> Fate | None:
    from lorasmith.schemas.data import Fate

    if text is None:
        return None
    fates = [fate.value for fate in Fate]
    if text not in fates:
        raise InvalidSpec(f"--fate must be {', '.join(fates)}, got {text!r}{did_you_mean(text, fates)}")
    return Fate(text)


def summary(dataset: Dataset) -> dict[str, str]:
    from lorasmith.schemas.data import PARTS

    fields = {
        "dataset": dataset.name,
        "format": f"{dataset.format}, because {dataset.format_reason}",
        "parts": ", ".join(f"{part} {dataset.part_sizes[part]}" for part in PARTS),
        "rows": counts(dataset.fates),
    }
    if dataset.statistics.get("ignored_fields"):
        fields["not used"] = counts(dataset.statistics["ignored_fields"])
    for name in ("flags", "languages"):
        if dataset.statistics.get(name):
            fields[name] = counts(dataset.statistics[name])
    if dataset.statistics.get("split_note"):
        fields["note"] = dataset.statistics["split_note"]
    return fields


def sizes(dataset: Dataset) -> list[str]:
    return [str(size) for size in dataset.part_sizes.values()]


def counts(values: dict[Any, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in values.items())


def show_fields(fields: dict[str, str]) -> None:
    width = max(map(len, fields))
    for name, value in fields.items():
        typer.echo(f"{name:<{width}}  {visible(value)}")


def show_example(example: Example) -> None:
    typer.echo(f"row {example.row}, example {example.id}")
    if example.messages is None:
        typer.echo(f"  text: {visible(example.text or '')}")
    for message in example.messages or ():
        show_message(message)
    for name, messages in (("chosen", example.chosen), ("rejected", example.rejected)):
        for message in messages or ():
            show_message(message, f"{name} ")
    if example.desirable is not None:
        typer.echo(f"  desirable: {str(example.desirable).lower()}")
    typer.echo()


def show_message(message: Message, before: str = "") -> None:
    weight = ", not trained" if message.weight == 0 else ""
    calls = "".join(
        f" call of {call.function.name}({json.dumps(call.function.arguments)})" for call in message.tool_calls or ()
    )
    typer.echo(f"  {before}{message.role}{weight}: {visible(message.content + calls)}")


def visible(text: str) -> str:
    """The text with control and bidi characters spelled out: data must not steer the terminal that shows it."""
    return STEERING.sub(lambda match: ascii(match[0])[1:-1], text)
