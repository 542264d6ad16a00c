"""The items of a benchmark: what the rows must not hold if a model is to be tested on it.

A benchmark asks and need not answer as training rows do, so more is read than an import takes. A list of texts in the
place of the question, such as the `turns` of MT-bench, is an item for each text, because a row that holds one of them
holds something of the test. A list in the place of the answer is the choices of one item, and a number is its label.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.schemas.data import DataPreparationSpec, DatasetFormat, Example
from lorasmith.services.data_conversion import convert
from lorasmith.services.data_detection import detect_source, first_rows
from lorasmith.services.data_formats import UnknownColumns, shape_of
from lorasmith.services.data_mapping import apply_mapping, likely_questions, mapping_option
from lorasmith.services.data_reading import Source
from lorasmith.services.data_rows import BrokenRow, RawRow
from lorasmith.services.data_sources import file_named
from lorasmith.services.data_turns import BadRow, text_at
from lorasmith.services.data_writing import FLAT, examples_of

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy

Head = Sequence[RawRow | BrokenRow]
TURNS = "turns"  # what one person says in a conversation, in its order


class Item(NamedTuple):
    """A row of a benchmark, or where the row lists several questions one of them: `element` is then `turns.1`."""

    example: Example
    element: str | None = None


def items_of(workbench: Workbench, benchmark: str, column_map: Mapping[str, str] | None = None) -> Iterator[Item]:
    """Of a dataset, all parts of it, or of a file or a folder of files, with their columns mapped."""
    path = file_named(workbench, benchmark)
    if path is not None:
        yield from items_of_file(path, column_map or {})
        return
    if column_map:
        raise InvalidSpec(f"--map is for the columns of a file, and {benchmark!r} is a dataset", hint="leave --map out")
    yield from (Item(example) for example, _ in examples_of(workbench, benchmark))


def items_of_file(path: Path, column_map: Mapping[str, str]) -> Iterator[Item]:
    source = Source.open(path)
    rows = source.rows()
    head = first_rows(rows)
    column_map, format = layout_of(source, head, column_map)
    for row in chain(head, rows):
        if isinstance(row, BrokenRow):
            raise row.error()
        try:
            yield from items_of_row(row, column_map, format)
        except BadRow as problem:
            raise InvalidData(
                f"{source.place(row)}: row {row.number}, {problem.message}",
                hint=way_out(source, row, column_map, format),
            ) from None


def layout_of(source: Source, head: Head, column_map: Mapping[str, str]) -> tuple[Mapping[str, str], DatasetFormat]:
    """What the columns are and the format that they make. Raises with a mapping that reads the first rows."""
    try:
        return column_map, format_of(source, head, column_map)
    except UnknownColumns as unknown:
        turns = {"text": TURNS}
        if not column_map and all(is_texts(row.values.get(TURNS)) for row in head if isinstance(row, RawRow)):
            return turns, format_of(source, head, turns)
        columns = likely_questions([row.values for row in head if isinstance(row, RawRow)])
        candidates = [{**column_map, **unknown.mapping}, *({"text": column} for column in columns)]
        mapping = next((one for one in candidates if one and reads(source, head, one)), None)
        hint = f"a mapping that looks right: {mapping_option(mapping)}" if mapping else unknown.hint
        if mapping is None and len(source.files) > 1:
            hint = "its files have different columns: give them one by one"
        raise InvalidData(unknown.message, hint=hint) from None


def format_of(source: Source, head: Head, column_map: Mapping[str, str]) -> DatasetFormat:
    """Of the questions alone, where nothing else is mapped: a column `label` is then no part of what is looked for."""
    spec = DataPreparationSpec(column_map=dict(column_map))
    if list(column_map) == ["text"]:
        spec.format = DatasetFormat.COMPLETION
    return detect_source(source, list(head), spec).format


def reads(source: Source, head: Head, column_map: Mapping[str, str]) -> bool:
    """Whether every one of these rows has an item, with the columns mapped so."""
    try:
        format = format_of(source, head, column_map)
        return all(list(items_of_row(row, column_map, format)) for row in head if isinstance(row, RawRow))
    except (InvalidData, InvalidSpec):
        return False


def items_of_row(row: RawRow, column_map: Mapping[str, str], format: DatasetFormat) -> Iterator[Item]:
    """Raises `BadRow` where something is missing."""
    values = apply_mapping(row.values, column_map)
    question, *answers = shape_of(values, format).required
    if format not in FLAT:
        yield Item(convert(RawRow(row.number, row.line, values), format))
        return
    values = {**values, **{field: as_text(values[field]) for field in answers if field in values}}
    asked = values.get(question)
    if not is_texts(asked):
        yield Item(convert(RawRow(row.number, row.line, values), format))
        return
    for index, text in enumerate(asked):
        element = f"{column_map.get(question, question)}.{index}"
        text_at({element: text}, element, "what is asked")
        yield Item(convert(RawRow(row.number, row.line, {**values, question: text}), format), element)


def as_text(answer: Any) -> Any:
    """A label as it is written, choices below each other; anything else as it stands."""
    if isinstance(answer, bool | int | float):
        return json.dumps(answer)
    return "\n".join(answer) if is_texts(answer) else answer


def is_texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def way_out(source: Source, row: RawRow, column_map: Mapping[str, str], format: DatasetFormat) -> str:
    """Of a row that has no item: an answer that is missing is not needed to look for its question."""
    question = shape_of(apply_mapping(row.values, column_map), format).required[0]
    alone = {"text": column_map.get(question, question)}
    if alone != dict(column_map) and reads(source, [row], alone):
        return f"mend the row, or look for the questions alone: {mapping_option(alone)}"
    return "mend the row, or leave it out of the file"
