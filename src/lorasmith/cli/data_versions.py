"""`lorasmith data dedup`, `split`, `restore`, `lineage` and `replay`: versions of a dataset and how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.data_options import AsJson, Name, known_stratum, parse_split
from lorasmith.cli.data_view import counts, show_fields, sizes
from lorasmith.cli.output import hint, print_json, print_table
from lorasmith.errors import InvalidSpec

if TYPE_CHECKING:
    from lorasmith.schemas.data import Dataset
    from lorasmith.services.data_redeciding import Redecision

NewName = Annotated[str | None, typer.Option("--name", help="Store it under a new name, not as a version of this one")]


def dedup(
    context: typer.Context,
    name: Name,
    threshold: Annotated[
        float | None, typer.Option("--threshold", help="Take near duplicates out from this similarity on, 0.4 to 1")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Bring all near duplicates back")] = False,
    new_name: NewName = None,
    as_json: AsJson = False,
) -> None:
    """Take near duplicates out of a dataset, as a new version"""
    from lorasmith.cli.data_progress import ImportView
    from lorasmith.services.data_redeciding import dedup

    if off and threshold is not None:
        raise InvalidSpec("give --threshold or --off, not both")
    wanted = None if off else 0.8 if threshold is None else threshold
    with ImportView() as view:
        done = dedup(open_workbench(context), name, wanted, new_name=checked_name(new_name), report=view)
    show_redecision(done, as_json)
    if wanted is not None:
        hint("the rows were hashed, which is kept for next time" if done.hashed else "nothing was hashed again")


def split(
    context: typer.Context,
    name: Name,
    shares: Annotated[str | None, typer.Option("--split", help="Shares of train, val and test, as 70/15/15")] = None,
    salt: Annotated[str | None, typer.Option("--salt", help="Choose another split by another salt")] = None,
    exact: Annotated[bool | None, typer.Option("--exact/--no-exact", help="Make the shares exact")] = None,
    stratify: Annotated[
        str | None, typer.Option("--stratify", help="Hold the shares within each: label or none")
    ] = None,
    new_name: NewName = None,
    as_json: AsJson = False,
) -> None:
    """Split a dataset anew, as a new version"""
    from lorasmith.cli.data_progress import ImportView
    from lorasmith.services.data_redeciding import split

    changes: dict[str, Any] = {
        **({} if shares is None else {"split": parse_split(shares)}),
        **({} if salt is None else {"salt": salt}),
        **({} if exact is None else {"exact": exact}),
        **({} if stratify is None else {"stratify": known_stratum(stratify)}),
    }
    if not changes:
        raise InvalidSpec("say what is to change: --split, --salt, --exact or --stratify", hint="--split 70/15/15")
    if exact and changes.get("stratify"):
        raise InvalidSpec("--exact cuts all rows and --stratify each label: give one of them")
    with ImportView() as view:
        done = split(open_workbench(context), name, changes, new_name=checked_name(new_name), report=view)
    show_redecision(done, as_json)


def restore(
    context: typer.Context,
    version: Annotated[str, typer.Argument(metavar="NAME@DIGITS", help="A version, as show names it")],
    as_json: AsJson = False,
) -> None:
    """Point the name of a dataset at an older version again"""
    from lorasmith.services.data_versions import restore_version

    dataset = restore_version(open_workbench(context), version)
    if as_json:
        print_json(dataset.model_dump(mode="json"))
    else:
        show_fields({"dataset": f"{dataset.name}, version {dataset.reference}", "parts": parts_of(dataset)})


def show_redecision(done: Redecision, as_json: bool) -> None:
    before, after = done.before, done.after
    if as_json:
        print_json(after.model_dump(mode="json"))
    else:
        fields = {
            "dataset": f"{after.name}, version {after.reference}",
            "parts": parts_of(after),
            "rows": counts(after.fates),
        }
        if after.id != before.id:
            fields["before"] = f"{before.reference}: {parts_of(before)}; {counts(before.fates)}"
        if after.statistics.get("split_note"):
            fields["note"] = after.statistics["split_note"]
        show_fields(fields)
    if after.id == before.id:
        hint("nothing changed: no new version was made")


def parts_of(dataset: Dataset) -> str:
    from lorasmith.schemas.data import PARTS

    return ", ".join(f"{part} {size}" for part, size in zip(PARTS, sizes(dataset), strict=True))


def lineage(context: typer.Context, name: Name, as_json: AsJson = False) -> None:
    """Show the steps that a dataset was made by, from its source on"""
    from lorasmith.services.data import get_dataset

    dataset = get_dataset(open_workbench(context), name)
    if as_json:
        print_json([step.model_dump(mode="json") for step in dataset.lineage])
        return
    columns = ("step", "from", "options", "version", "lorasmith", "when")
    print_table(
        columns,
        [
            [
                step.operation,
                ", ".join(f"{one.name}@{one.sha256[:12]}" for one in step.inputs),
                options_of(step.spec),
                step.sha256[:12],
                step.lorasmith,
                f"{step.created_at:%Y-%m-%d %H:%M}",
            ]
            for step in dataset.lineage
        ],
    )


def options_of(spec: dict[str, Any]) -> str:
    """Those that say something; --json has all."""
    said = {key: value for key, value in spec.items() if value not in (None, [], {}, False, 0.0)}
    return ", ".join(f"{key} {value}" for key, value in said.items() if key != "imported")


def replay(
    context: typer.Context,
    name: Name,
    source: Annotated[Path | None, typer.Option("--source", help="Where the source is now, if it was moved")] = None,
    as_json: AsJson = False,
) -> None:
    """Run the steps of a dataset again from its source and compare the digests"""
    from lorasmith.cli.data_progress import ImportView
    from lorasmith.services.data_replay import replay

    with ImportView() as view:
        done = replay(open_workbench(context), name, source=source, report=view)
    if as_json:
        print_json(done.model_dump(mode="json"))
    else:
        print_table(
            ("step", "recorded", "replayed", "", "why"),
            [
                [
                    s.operation,
                    s.recorded[:12],
                    s.replayed[:12],
                    "equal" if s.equal else "differs",
                    s.difference or s.note or "",
                ]
                for s in done.steps
            ],
        )
    if not done.equal:
        raise typer.Exit(1)


def checked_name(name: str | None) -> str | None:
    from lorasmith.cli.data_options import import_spec

    if name is not None:
        import_spec(name, "auto", "80/10/10", False, "", 0.0)
    return name
