"""`lorasmith data preview --labels`: tokens in runs of one role, readable without colour."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lorasmith.cli.data_view import visible
from lorasmith.cli.output import console_out, hint, print_json
from lorasmith.errors import InvalidSpec

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from lorasmith.schemas.labels import LabelledExample, LabelledRow, LabelledToken
    from lorasmith.services.workbench import Workbench

STYLES = {"trained": "bold green", "stop": "bold black on green", "masked": "", "cut": "red strike"}
FATE_STYLES = {"kept": "green", "cut": "yellow", "split": "yellow", "dropped": "yellow", "refused": "bold red"}
GUTTER = 16  # columns: role, count, bar
# Spaces that a reader would miss: at the edges of a line or a run, doubled, and all but the plain one.
HIDDEN_SPACE = re.compile(r"^ +| +$| {2,}|[\t\u00a0\u2000-\u200b\u2028\u2029\u202f\u3000\ufeff]")
LEGEND = (
    "trained: carries loss · stop: trained, and generation ends there · masked: read, never predicted · "
    "cut: left out · ⏎ new line · ␣ space · → tab"
)


def preview_labels(workbench: Workbench, values: dict[str, Any], *, as_json: bool) -> None:
    from lorasmith.cli.watching import JobView
    from lorasmith.schemas.labels import LabelSpec
    from lorasmith.services.data_labels import show_labels
    from lorasmith.services.specs import parse_spec

    if "model" not in values:
        raise InvalidSpec(
            "--labels needs --model: its tokenizer and template make the tokens", hint="for example --model starter"
        )
    spec = parse_spec(LabelSpec, values)
    with JobView("labels") as view:
        report = show_labels(workbench, spec, view)
    if as_json:
        print_json(report.model_dump(mode="json"))
        return
    console = console_out()
    for row in report.rows:
        print_row(console, row)
    hint(f"{LEGEND}\nat most {report.max_tokens} tokens, longer rows: {report.too_long}")


def print_row(console: Console, row: LabelledRow) -> None:
    from rich.text import Text

    title = Text.assemble((f"row {row.row}", "bold"), "  ", (row.fate, FATE_STYLES[row.fate]))
    if row.reason:
        title.append(f"  {row.reason}")
    console.print(title, soft_wrap=True)
    for failed in row.failed_checks:
        state = "overridden" if failed.overridden else "fails"
        line = Text.assemble((f"{state} `{failed.check}`", "yellow" if failed.overridden else "bold red"))
        console.print(line.append(f": {failed.sentence}"), soft_wrap=True)
        if not failed.overridden:
            override = f"lorasmith train --set 'training.allow=[{failed.check}]'"
            console.print(f"  {failed.mend}\n  or override it: {override}", soft_wrap=True, markup=False)
    for number, example in enumerate(row.examples, start=1):
        print_example(console, example, f"example {number} of {len(row.examples)}: " if len(row.examples) > 1 else "")
    console.print()


def print_example(console: Console, example: LabelledExample, title: str) -> None:
    from rich.text import Text

    stop = "the stop token is trained" if example.stop_trained else "no stop token at the end of what is trained"
    cut = f", {example.cut} cut" if example.cut else ""
    console.print(
        f"{title}{example.total} tokens, {example.trained} trained{cut}; {stop}", markup=False, soft_wrap=True
    )
    width = console.width - GUTTER if sys.stdout.isatty() else 10_000
    for role, tokens in runs(example.tokens):
        for index, line in enumerate(lines(tokens, max(width, 20))):
            gutter = f"{role:<8}{len(tokens):>5} │ " if index == 0 else f"{'':<13} │ "
            console.print(Text.assemble((gutter, "dim"), line), soft_wrap=True)


def runs(tokens: list[LabelledToken]) -> Iterator[tuple[str, list[LabelledToken]]]:
    """Neighbours of the same role; a trained stop token is a role of its own."""
    for role, run in groupby(tokens, key=role_of):
        yield role, list(run)


def role_of(token: LabelledToken) -> str:
    return "stop" if token.role == "trained" and token.is_stop else token.role


def lines(tokens: list[LabelledToken], width: int) -> Iterator[Text]:
    """The text of a run, broken after each new line and at the width, with hidden white space spelled out."""
    from rich.cells import chop_cells
    from rich.text import Text

    role = role_of(tokens[0])
    special = [token.text for token in tokens if token.is_special and token.text]
    text = "".join(token.text for token in tokens)
    for line in re.findall(r"[^\n]*\n|[^\n]+", text) or [""]:
        body = visible(HIDDEN_SPACE.sub(spelled, line.removesuffix("\n"))) + "⏎" * line.endswith("\n")
        for piece in chop_cells(body, width) or [""]:
            shown = Text(piece, style=STYLES[role])
            if role == "masked":
                shown.highlight_words(special, style="cyan")
            yield shown


def spelled(match: re.Match[str]) -> str:
    return "".join("␣" if char == " " else "→" if char == "\t" else ascii(char)[1:-1] for char in match[0])
