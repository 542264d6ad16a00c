"""Datasets, examples and ledger lines for a reader."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from lorasmith.schemas.data import Dataset, Example, LedgerLine, Message

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


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
    for name, label in (("flags", "flags"), ("languages", "languages"), ("made_by", "augmented")):
        if dataset.statistics.get(name):
            fields[label] = counts(dataset.statistics[name])
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
    if example.made_by is not None:
        made_by = example.made_by
        typer.echo(
            f"  made by: {visible(f'{made_by.method}, {made_by.teacher} at {made_by.host}, of {made_by.source}')}"
        )
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


def why(line: LedgerLine) -> str | None:
    """The reason of a row's fate, how it was changed, and what was found in it."""
    told = () if line.fate == "rejected" else line.flags or ()  # the reason is one of them
    flags = [f"{flag.check}: {flag.sentence()}" for flag in told]
    return "; ".join([*filter(None, [line.reason]), *(line.changes or ()), *flags]) or None
