"""Which of the known row formats a file has, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from lorasmith.errors import InvalidData, closest
from lorasmith.schemas.data import DatasetFormat, Detection
from lorasmith.services.data_mapping import mapping_option, suggest_mapping
from lorasmith.services.data_preferences import truth_of

SHOWN_COLUMNS = 30
ROW_FIELDS = ("group", "split", "source", "made_by")  # optional in rows of every format


@dataclass(frozen=True)
class Shape:
    """Fields that a row of a format must have, and those that it may have."""

    format: DatasetFormat
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


# The first shape whose fields a file has is its format, so the more telling ones stand first.
SHAPES = (
    Shape(DatasetFormat.PREFERENCE, ("prompt", "chosen", "rejected"), ("system",)),
    Shape(DatasetFormat.PREFERENCE, ("instruction", "chosen", "rejected"), ("input", "system")),
    Shape(DatasetFormat.PREFERENCE, ("input", "preferred_output", "non_preferred_output")),
    Shape(DatasetFormat.PREFERENCE, ("chosen", "rejected"), ("system",)),
    Shape(DatasetFormat.KTO, ("prompt", "completion", "label")),
    Shape(DatasetFormat.CHATML, ("messages",), ("tools",)),
    Shape(DatasetFormat.SHAREGPT, ("conversations",), ("system", "tools")),
    Shape(DatasetFormat.INTERACTIONS, ("task", "execution"), ("agent",)),
    Shape(DatasetFormat.ALPACA, ("instruction", "output"), ("input", "system")),
    Shape(DatasetFormat.CHAT, ("input", "output"), ("system",)),
    Shape(DatasetFormat.CHAT, ("prompt", "completion"), ("system",)),
    Shape(DatasetFormat.CHAT, ("question", "answer"), ("system",)),
    Shape(DatasetFormat.CLASSIFICATION, ("text", "label")),
    Shape(DatasetFormat.CLASSIFICATION, ("text", "category")),
    Shape(DatasetFormat.SUMMARIZATION, ("text", "summary")),
    Shape(DatasetFormat.COMPLETION, ("text",)),
)


class UnknownColumns(InvalidData):
    """Of rows that have no format as they stand; `mapping` makes them rows of one, empty where none looks right."""

    def __init__(self, message: str, mapping: dict[str, str]) -> None:
        looks_right = f"a mapping that looks right: {mapping_option(mapping)}"
        say_which = "say which column is which, such as --map text=COLUMN; a CSV file names them in its first line"
        super().__init__(message, hint=looks_right if mapping else say_which)
        self.mapping = mapping


def detect_format(
    rows: Sequence[Mapping[str, Any]], *, file: str = "the file", wanted: DatasetFormat | Literal["auto"] = "auto"
) -> Detection:
    """The format that the fields of the rows tell, or the wanted one when they allow it."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    if wanted != "auto":
        return check_format(rows, columns, wanted, file)
    kto = has_truths(rows)
    shape = first_shape(common_columns(rows), kto) or first_shape(columns, kto)
    if shape is None:
        accepted = "; ".join(f"{' + '.join(shape.required)} ({shape.format})" for shape in SHAPES)
        raise UnknownColumns(
            f"{file} has the columns {listed(columns)}, expected one of: {accepted}{suggestion(columns)}",
            likely_mapping(rows, columns),
        )
    unused = sorted(set(columns) - set(shape.required) - set(shape.optional) - set(ROW_FIELDS))
    reason = f"it has {' and '.join(f'`{name}`' for name in shape.required)}"
    if unused:
        reason += f"; not used: {', '.join(f'`{name}`' for name in unused)}"
    return Detection(format=shape.format, reason=reason)


def check_format(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], wanted: DatasetFormat, file: str
) -> Detection:
    shapes = [shape for shape in SHAPES if shape.format == wanted]
    if not any(set(shape.required) <= set(columns) for shape in shapes):
        needed = " or ".join(" + ".join(shape.required) for shape in shapes)
        mapping = likely_mapping(rows, columns, wanted)
        raise InvalidData(
            f"{file} has the columns {listed(columns)}; the format {wanted} needs {needed}{suggestion(columns)}",
            hint=f"a mapping that looks right: {mapping_option(mapping)}"
            if mapping
            else "leave --format out to have the format detected, or rename the columns",
        )
    return Detection(format=wanted, reason="it was asked for")


def likely_mapping(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], wanted: DatasetFormat | None = None
) -> dict[str, str]:
    """Field → column that makes the columns those of a format, of the wanted one if there is one; empty if none does."""
    turns = any(isinstance(value, list) and value and isinstance(value[0], dict) for value in rows[0].values())
    required = [shape.required for shape in SHAPES if wanted in (None, shape.format)]
    required = [fields for fields in required if turns or fields[0] not in ("messages", "conversations")]
    return suggest_mapping(columns[:SHOWN_COLUMNS], required)


def listed(columns: Sequence[str]) -> str:
    more = f" and {len(columns) - SHOWN_COLUMNS} more" if len(columns) > SHOWN_COLUMNS else ""
    return ", ".join(columns[:SHOWN_COLUMNS]) + more


def suggestion(columns: Iterable[str]) -> str:
    """`; did you mean 'instruction' for 'instuction'?`, or an empty string when nothing is near."""
    known = {name for shape in SHAPES for name in (*shape.required, *shape.optional)}
    for column in islice(columns, SHOWN_COLUMNS):
        match = None if column in known else closest(column.lower(), sorted(known))
        if match is not None:
            return f"; did you mean {match!r} for {column!r}?"
    return ""


def common_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Fields that at least half of the rows have: a row that lacks its answer does not change what the file is."""
    counts = Counter(name for row in rows for name in row)
    return [name for name, count in counts.items() if 2 * count >= len(rows)]


def first_shape(columns: Iterable[str], kto: bool) -> Shape | None:
    present = set(columns)
    possible = (shape for shape in SHAPES if kto or shape.format != DatasetFormat.KTO)
    return next((shape for shape in possible if present.issuperset(shape.required)), None)


def has_truths(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the labels are all true or false, as those of KTO are and names of classes are not."""
    labels = [row["label"] for row in rows if row.get("label") is not None]
    return bool(labels) and all(truth_of(label) is not None for label in labels)


def shape_of(values: Mapping[str, Any], format: DatasetFormat) -> Shape:
    """The shape of one row among those of its format: the complete one, else one with a field in it."""
    shapes = [shape for shape in SHAPES if shape.format == format]
    complete = (shape for shape in shapes if set(shape.required) <= set(values))
    begun = (shape for shape in shapes if set(shape.required) & set(values))
    return next(complete, None) or next(begun, shapes[0])
