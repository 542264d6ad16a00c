"""`lorasmith data`: import, show, preview, explain, prepare and remove datasets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli import (
    data_augmentation,
    data_duplicates,
    data_ledger,
    data_statistics,
    data_validation,
    data_versions,
)
from lorasmith.cli.context import open_workbench
from lorasmith.cli.data_options import (
    Allow,
    AsJson,
    Columns,
    Encoding,
    Format,
    Languages,
    MaxChars,
    MaxRejected,
    MaxSeqLength,
    Mending,
    MinChars,
    Name,
    Rejecting,
    Strict,
    Template,
    Tokenizer,
    TooLong,
    domain_names,
    import_spec,
    known_format,
    known_part,
    known_stratum,
    near_duplicates_from,
    preparation_spec,
    row_checks,
    row_range,
)
from lorasmith.cli.data_view import counts, show_example, show_fields, sizes, summary
from lorasmith.cli.output import hint, print_json, print_table, size
from lorasmith.errors import InvalidSpec

if TYPE_CHECKING:
    from lorasmith.schemas.data import DataPreparationSpec

app = typer.Typer(help="Import, show and prepare datasets", no_args_is_help=True)

File = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE", help="JSON, JSON Lines, CSV or Parquet file, a folder of them, a saved dataset or hub id"
    ),
]
Split = Annotated[str, typer.Option("--split", help="Shares of train, val and test")]
Salt = Annotated[str, typer.Option("--salt", help="Choose another split by another salt")]


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
    strict: Strict = False,
    map: Columns = None,
    encoding: Encoding = None,
    mend: Mending = None,
    reject: Rejecting = None,
    min_chars: MinChars = None,
    max_chars: MaxChars = None,
    language: Languages = None,
    tokenizer: Tokenizer = None,
    near_duplicates: Annotated[
        float | None, typer.Option("--near-duplicates", help="Take out rows from this similarity on, such as 0.8")
    ] = None,
    stratify: Annotated[str | None, typer.Option("--stratify", help="Hold the shares within each: label")] = None,
    as_json: AsJson = False,
) -> None:
    """Import a file as a dataset with train, val and test parts"""
    from lorasmith.cli.data_progress import ImportView
    from lorasmith.services.data_import import import_dataset

    checks = {
        **row_checks(
            strict=strict,
            columns=map,
            encoding=encoding,
            mend=mend,
            reject=reject,
            min_chars=min_chars,
            max_chars=max_chars,
            languages=language,
            tokenizer=tokenizer,
        ),
        "near_duplicates": near_duplicates_from(near_duplicates),
        "stratify": known_stratum(stratify),
    }
    if exact and checks["stratify"]:
        raise InvalidSpec("--exact cuts all rows and --stratify each label: give one of them")
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
    """Show a dataset: source, parts, fates of the rows, lengths and versions"""
    from lorasmith.services.data import get_dataset, tokens_bytes
    from lorasmith.services.data_versions import parents_of, versions_of

    workbench = open_workbench(context)
    dataset = get_dataset(workbench, name)
    stored_bytes = tokens_bytes(workbench, dataset.id)
    if as_json:
        print_json({**dataset.model_dump(mode="json"), "tokens_bytes": stored_bytes})
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
            **({"tokens": f"{size(stored_bytes)} of stored tokens"} if stored_bytes else {}),
            "source": dataset.source,
            "source sha256": dataset.source_sha256,
            "sha256": dataset.sha256,
            "id": dataset.id,
            "version": dataset.reference,
            "made by": " → ".join(step.operation for step in dataset.lineage),
            "parents": ", ".join(f"{one.name}@{one.sha256[:12]}" for one in parents_of(dataset)) or "none",
            "versions": ", ".join(one.reference for one in versions_of(workbench, dataset.plain_name)),
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
    template: Template = None,
    max_seq_length: MaxSeqLength = None,
    too_long: TooLong = None,
    allow: Allow = None,
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
    force: Annotated[bool, typer.Option("--force", help="Remove it though it is used")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a dataset with all its versions, or with NAME@digits one version"""
    from lorasmith.services.data_removal import remove_dataset, versions_to_remove

    workbench = open_workbench(context)
    chosen = versions_to_remove(workbench, name)
    if not yes:
        if not sys.stdin.isatty():
            raise InvalidSpec(f"removing {name!r} needs --yes", hint=f"lorasmith data rm {name} --yes")
        versions = ", ".join(f"{one.reference} with {one.num_examples} examples" for one in chosen)
        typer.confirm(f"Remove {versions}?", abort=True, err=True)
    removed = remove_dataset(workbench, name, force=force)
    if as_json:
        print_json({"removed": [dataset.id for dataset in removed]})
        return
    for dataset in removed:
        hint(f"removed {dataset.reference} ({dataset.id})")


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
        found = {"written": result.written, "left_out": result.left_out, "lost": result.lost}
        print_json({"output": str(output), **found})
        return
    show_fields(
        {
            "file": str(output),
            "rows": str(result.written),
            **{f"left out: {why}": str(count) for why, count in result.left_out.items()},
            **{f"lost: {what}": str(count) for what, count in result.lost.items()},
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
    domains: Annotated[
        str | None, typer.Option("--domains", help="Prepare these of a folder: financial,legal; each has its folder")
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option("--max-samples", min=1, help="Read at most the first so many rows, of each domain")
    ] = None,
    near_duplicates: Annotated[
        float | None, typer.Option("--near-duplicates", help="Take out rows from this similarity on, such as 0.8")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of an earlier run")] = False,
    as_json: AsJson = False,
) -> None:
    """Write conversations or collected interactions as ChatML train, val and test files"""
    from lorasmith.services.data_preparation import prepare_and_import, prepare_domains, prepare_folder

    checks = {"near_duplicates": near_duplicates_from(near_duplicates), "max_rows": max_samples}

    def spec_of(dataset_name: str | None) -> DataPreparationSpec:
        if dataset_name is None:
            return preparation_spec(format, split, exact, salt, max_rejected, checks)
        return import_spec(dataset_name, format, split, exact, salt, max_rejected, checks)

    if domains is not None:
        specs = {domain: spec_of(f"{name}-{domain}" if name else None) for domain in domain_names(domains)}
        workbench = open_workbench(context) if name else None
        prepared = prepare_domains(file, output, specs, workbench=workbench, force=force)
        if as_json:
            print_json(prepared)
        else:
            show_domains(prepared)
        return
    if name is None:
        metadata = prepare_folder(file, output, spec_of(None), force=force)
    else:
        wanted = import_spec(name, format, split, exact, salt, max_rejected, checks)
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


def show_domains(prepared: dict[str, dict[str, Any]]) -> None:
    columns = ("domain", "format", "train", "val", "test", "rows", "dataset")
    rows = [
        [
            domain,
            f"{one['format']}, because {one['format_reason']}",
            *(one[f"{part}_examples"] for part in one["split"]),
            counts(one["fates"]),
            one.get("dataset", {}).get("name", ""),
        ]
        for domain, one in prepared.items()
    ]
    print_table(columns, rows)


for command in (
    data_ledger.ledger,
    data_statistics.stats,
    data_validation.validate,
    data_duplicates.duplicates,
    data_duplicates.contamination,
    data_duplicates.leakage,
):
    app.command()(command)
for making_versions in (
    data_versions.dedup,
    data_versions.split,
    data_versions.restore,
    data_versions.lineage,
    data_versions.replay,
):
    app.command()(making_versions)
for augmentation in (data_augmentation.augment, data_augmentation.review):
    app.command()(augmentation)
