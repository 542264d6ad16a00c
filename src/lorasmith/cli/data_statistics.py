"""`lorasmith data stats`: tables and a histogram that read without colour, JSON, or a page."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.data_options import AsJson, Template
from lorasmith.cli.data_view import counts, show_fields, visible
from lorasmith.cli.output import console_out, duration, hint, print_json, print_table, size
from lorasmith.errors import InvalidSpec

if TYPE_CHECKING:
    from lorasmith.schemas.estimation import Estimate
    from lorasmith.schemas.statistics import Bin, DatasetStatistics, Distribution, TokenStatistics

COLUMNS = ("part", "of an example", "mean", "p50", "p90", "p95", "p99", "max", "total")
LABELS, LANGUAGES = 20, 6  # that are shown
BAR_CELLS = 40
EIGHTHS = " ▏▎▍▌▋▊▉"


def stats(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or id of the dataset")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="Count tokens as this model is trained")] = None,
    template: Template = None,
    max_seq_length: Annotated[int | None, typer.Option("--max-seq-length", min=8, help="Tokens, as in train")] = None,
    estimate: Annotated[bool, typer.Option("--estimate", help="Also measure how long training takes")] = False,
    preset: Annotated[str | None, typer.Option("--preset", help="Of the run that is estimated, as in train")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write a page with charts, *.html")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page")] = False,
    as_json: AsJson = False,
) -> None:
    """Show lengths, tokens, roles, languages and labels of a dataset"""
    from lorasmith.cli.watching import JobView
    from lorasmith.schemas.statistics import StatisticsSpec
    from lorasmith.services.data_describe import describe_dataset, estimate_run
    from lorasmith.services.data_statistics_page import write_page
    from lorasmith.services.specs import parse_spec

    for option, value in (("template", template), ("max-seq-length", max_seq_length), ("estimate", estimate)):
        if value and model is None:
            raise InvalidSpec(f"--{option} is about tokens, which need --model", hint="for example --model starter")
    if preset and not estimate:
        raise InvalidSpec("--preset belongs to the run that --estimate measures", hint="add --estimate")
    given = {"data": name, "model": model, "template": template, "max_seq_length": max_seq_length}
    spec = parse_spec(StatisticsSpec, {key: value for key, value in given.items() if value is not None})
    workbench = open_workbench(context)
    with JobView("stats") as view:
        found = describe_dataset(workbench, spec, view)
        if estimate:
            found.estimate = estimate_run(workbench, spec, preset, view)
    if output is not None:
        write_page(found, output, force=force)
        hint(f"written to {output}")
    if as_json:
        print_json(found.model_dump(mode="json"))
    else:
        show(found)
        if found.tokens is None:
            hint("tokens of a model: --model starter, a folder, a hub id or a registered name")


def show(found: DatasetStatistics) -> None:
    show_fields(
        {
            "dataset": f"{found.dataset}, {found.format}",
            "examples": counts({part: content.examples for part, content in found.parts.items()}),
            "rows": counts(found.fates),
        }
    )
    rows: list[list[str]] = []
    facts: dict[str, str] = {}
    for part, content in found.parts.items():
        if content.roles:
            facts[f"{part} roles"] = counts(content.roles)
        if content.languages is not None:
            looked = "" if content.languages_of == content.examples else f" (of {content.languages_of:,} looked at)"
            facts[f"{part} languages"] = most_frequent(content.languages, content.languages_of, LANGUAGES) + looked
        if content.labels is not None:
            facts[f"{part} labels"] = most_frequent(content.labels, content.examples, LABELS)
        measured = [
            ("turns", content.turns),
            ("prompt characters", content.prompt_characters),
            ("answer characters", content.answer_characters),
        ]
        if found.tokens is not None:
            measured += [("tokens", found.tokens.parts[part].tokens), ("  trained", found.tokens.parts[part].trained)]
        rows += [[part if place == 0 else "", name, *numbers(values)] for place, (name, values) in enumerate(measured)]
    print_table(COLUMNS, rows)
    if facts:
        show_fields(facts)
    if found.tokens is not None:
        show_tokens(found.tokens)
    if found.estimate is not None:
        show_time(found.estimate)


def numbers(values: Distribution) -> list[str]:
    ranks = (values.p50, values.p90, values.p95, values.p99, values.max, values.total)
    return [f"{values.mean:,.1f}", *(f"{rank:,}" for rank in ranks)]


def most_frequent(found: Mapping[str, int], examples: int, shown: int) -> str:
    """`positive 12 (60 %), negative 8 (40 %) and 3 more`"""
    words = [f"{visible(name)} {count:,} ({count / examples:.0%})" for name, count in found.items()][:shown]
    more = len(found) - len(words)
    return ", ".join(words) + (f" and {more} more" if more else "")


def show_tokens(found: TokenStatistics) -> None:
    """What training makes of the tokens, and how long the training examples are."""
    for part, tokens in found.parts.items():
        share = f"{tokens.over / tokens.tokens.count:.1%}"
        over = f"{tokens.over:,} of {tokens.tokens.count:,} examples ({share}) are over {found.max_tokens:,} tokens"
        lost = f", by {tokens.over_tokens:,} tokens" if tokens.over else ""
        console_out().print(f"{part}: {tokens.trained_share:.1%} of the tokens are trained; {over}{lost}", markup=False)
        for check, count in tokens.failed_checks.items():
            console_out().print(f"{part}: {count:,} examples fail the check `{check}`", markup=False)
    part, tokens = next(iter(found.parts.items()))
    console_out().print(f"\ntokens of an example in {part}, as {found.model} is trained", markup=False)
    for line in histogram(tokens.tokens.bins):
        console_out().print(line, markup=False)


def histogram(bins: list[Bin]) -> list[str]:
    """One line for each bin; without a terminal whole cells alone."""
    ranges = [f"{one.start:,}–{one.end - 1:,}" if one.end is not None else f"{one.start:,}+" for one in bins]
    width = max(map(len, ranges))
    most = max(one.count for one in bins)
    return [
        f"{name:>{width}}  {bar(one.count / most):<{BAR_CELLS}} {one.count:,}"
        for name, one in zip(ranges, bins, strict=True)
    ]


def bar(share: float) -> str:
    """Of `BAR_CELLS` cells for a share of 1, in eighths of a cell; a share above 0 is never invisible."""
    eighths = max(round(share * BAR_CELLS * 8), 1 if share else 0)
    if not sys.stdout.isatty():
        return "█" * (eighths // 8) or ("▏" if share else "")
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).rstrip()


def show_time(found: Estimate) -> None:
    clock = found.time
    if clock is None:
        hint(f"no time: {found.why_no_time}")
        return
    how = f"{found.steps:,} steps, {clock.tokens_per_s:,.0f} tokens/s"
    span = f"{duration(clock.low_s)} to {duration(clock.high_s)}"
    console_out().print(
        f"\ntraining takes about {duration(clock.total_s)} ({span}; {how}) and {size(found.memory.peak_bytes)} of memory"
    )
