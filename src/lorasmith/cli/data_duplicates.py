"""`lorasmith data duplicates`, `contamination` and `leakage`: which rows say the same, and which a test would meet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.data_options import known_part, one_of
from lorasmith.cli.data_versions import NewName, checked_name, show_redecision
from lorasmith.cli.data_view import show_fields, visible
from lorasmith.cli.output import hint, print_json, print_table
from lorasmith.errors import InvalidSpec

if TYPE_CHECKING:
    from lorasmith.schemas.duplicates import ContaminationReport, DuplicateReport, HeldItem, SimilarityReport

SHOWN = 10
SHOWN_CHARACTERS = 80
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the dataset")]
Similarity = Annotated[float, typer.Option("--similarity", help="From which two texts are similar, 0.4 to 1")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with everything that was found")]


def duplicates(
    context: typer.Context,
    name: Name,
    threshold: Annotated[
        float,
        typer.Option("--threshold", help="Similarity of near duplicates, 0.4 to 1; of --semantic a cosine from 0.5"),
    ] = 0.8,
    semantic: Annotated[
        bool,
        typer.Option("--semantic", help="Pairs with their words in another order or form, for a person to decide on"),
    ] = False,
    key: Annotated[str, typer.Option("--key", help="What is compared: whole, instruction or answer")] = "whole",
    as_json: AsJson = False,
) -> None:
    """Show rows of a dataset that say the same"""
    from lorasmith.services.data_duplicates.stored import find_duplicates
    from lorasmith.services.data_duplicates.texts import KEYS

    one_of("--key", key, KEYS)
    chosen = next(known for known in KEYS if known == key)
    if semantic:
        from lorasmith.services.data_duplicates.similar import find_similar

        show_similar(find_similar(open_workbench(context), name, threshold, chosen), as_json=as_json)
        return
    report = find_duplicates(open_workbench(context), name, threshold, chosen)
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        show_duplicates(report)
    hint(
        "the rows were hashed; another --threshold reads the same index"
        if report.hashed
        else "the index of an earlier search was read, nothing was hashed again"
    )


def show_duplicates(report: DuplicateReport) -> None:
    fields = {
        "dataset": report.dataset,
        "rows": f"{report.rows}, of which {report.kept} would stay at {report.threshold:g}, comparing {report.key}",
        "duplicates": f"exact {report.exact}, near {report.near} in {counted(report.near_clusters, 'cluster')}",
        "groups": f"{len(report.groups)} with one instruction and different answers",
    }
    if report.uncompared_pairs:
        fields["not compared"] = f"up to {report.uncompared_pairs} pairs"
    show_fields(fields)
    if report.duplicates:
        shown = sorted(report.duplicates, key=lambda one: (one.of, one.row))[:SHOWN]
        columns = ("row", "is", "of row", "similarity", "through row")
        print_table(columns, [[d.row, d.kind, d.of, f"{d.similarity:.3f}", d.via or ""] for d in shown])
        say_rest(len(report.duplicates), "duplicates")
    for rows in report.groups[:SHOWN]:
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        typer.echo(f"one instruction: rows {', '.join(map(str, rows[:SHOWN]))}{more}")
    say_rest(len(report.groups), "groups")


def show_similar(report: SimilarityReport, *, as_json: bool) -> None:
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    show_fields(
        {
            "dataset": report.dataset,
            "rows": f"{report.rows}, each compared with all others by {report.key}; {report.left_out} duplicates left out",
            "pairs": f"{len(report.pairs)} with a cosine of {report.threshold:g} or more, for a person to decide on",
        }
    )
    for pair in report.pairs[:SHOWN]:
        typer.echo(f"\n{pair.cosine:.3f}  similarity {pair.similarity:.3f}")
        for row, text in zip(pair.rows, pair.texts, strict=True):
            typer.echo(f"  row {row}: {short(' '.join(text.split()))}")
    say_rest(len(report.pairs), "pairs")


def contamination(
    context: typer.Context,
    name: Name,
    benchmark: Annotated[str, typer.Option("--benchmark", help="File or dataset whose items are looked for")],
    part: Annotated[
        str | None, typer.Option("--part", help="Where they are looked for: train, val or test; without it, train")
    ] = None,
    similarity: Similarity = 0.8,
    map: Annotated[list[str] | None, typer.Option("--map", help="Columns of a file, as in import: text=prompt")] = None,
    reject: Annotated[
        bool, typer.Option("--reject", help="Take such rows out of every part, as a new version")
    ] = False,
    new_name: NewName = None,
    as_json: AsJson = False,
) -> None:
    """Show rows that hold items of a benchmark, or take them out"""
    if reject and part:
        raise InvalidSpec("--reject takes rows out of every part: leave --part out")
    from lorasmith.services.data_mapping import parse_mapping

    columns = parse_mapping(map or [])
    if reject:
        decontaminate(context, name, benchmark, similarity, columns, new_name, as_json)
        return
    from lorasmith.services.data_duplicates.leaks import find_contamination

    report = find_contamination(
        open_workbench(context), name, benchmark, known_part(part or "train"), similarity, columns
    )
    if as_json:
        print_json(report.model_dump(mode="json"))
    else:
        show_contamination(report)


def leakage(
    context: typer.Context,
    name: Name,
    similarity: Similarity = 0.8,
    reject: Annotated[bool, typer.Option("--reject", help="Take such rows out, as a new version")] = False,
    new_name: NewName = None,
    as_json: AsJson = False,
) -> None:
    """Show rows of train that hold rows of val or test, or take them out"""
    if reject:
        decontaminate(context, name, None, similarity, {}, new_name, as_json)
        return
    from lorasmith.services.data_duplicates.leaks import find_leakage

    reports = find_leakage(open_workbench(context), name, similarity)
    if as_json:
        print_json([report.model_dump(mode="json") for report in reports])
        return
    for report in reports:
        show_contamination(report)


def decontaminate(
    context: typer.Context,
    name: str,
    benchmark: str | None,
    similarity: float,
    columns: dict[str, str],
    new_name: str | None,
    as_json: bool,
) -> None:
    from lorasmith.services.data_decontamination import decontaminate

    workbench, new_name = open_workbench(context), checked_name(new_name)
    show_redecision(decontaminate(workbench, name, benchmark, similarity, columns, new_name=new_name), as_json)


def show_contamination(report: ContaminationReport) -> None:
    kinds = f"exact {report.exact}, words {report.words}, similar {report.similar}"
    held = f"{report.held} of {counted(report.items, 'item')} of {report.benchmark}"
    typer.echo(f"{report.part} of {report.dataset} ({counted(report.rows, 'row')}) holds {held}: {visible(kinds)}")
    if report.hits:
        columns = ("row", "item", "kind", "in the", "text")
        hits = report.hits[:SHOWN]
        print_table(
            columns, [[h.row, item_of(h), kind_of(h.kind, h.similarity), h.compared, short(h.text)] for h in hits]
        )
        say_rest(len(report.hits), "hits")


def item_of(hit: HeldItem) -> str:
    return str(hit.item) if hit.element is None else f"{hit.item} {hit.element}"


def kind_of(kind: str, similarity: float | None) -> str:
    return kind if similarity is None else f"{kind} {similarity:.2f}"


def short(text: str) -> str:
    return visible(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} …")


def say_rest(number: int, what: str) -> None:
    if number > SHOWN:
        hint(f"the first {SHOWN} of {number} {what}; --json prints all")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
