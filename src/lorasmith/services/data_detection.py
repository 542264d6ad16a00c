"""The format of a source, found from its first rows; what is asked of its columns is held against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from lorasmith.errors import InvalidData, InvalidSpec, did_you_mean
from lorasmith.schemas.data import DataPreparationSpec, DatasetFormat, Detection
from lorasmith.services.data_formats import SHAPES, detect_format
from lorasmith.services.data_mapping import apply_mapping, check_mapping
from lorasmith.services.data_reading import Source
from lorasmith.services.data_rows import BrokenRow, RawRow

DETECTION_ROWS = 1000
DETECTION_CHARS = 16 * 1024 * 1024
SHOWN_FILES = 3


def first_rows(rows: Iterator[RawRow | BrokenRow]) -> list[RawRow | BrokenRow]:
    """Those that the format is found from; fewer where they are long."""
    head: list[RawRow | BrokenRow] = []
    size = 0
    for row in islice(rows, DETECTION_ROWS):
        head.append(row)
        size += sum(len(value) for value in getattr(row, "values", {}).values() if isinstance(value, str | list))
        if size > DETECTION_CHARS:
            break
    return head


def detect_source(source: Source, head: list[RawRow | BrokenRow], spec: DataPreparationSpec) -> Detection:
    """The format of a source whose first rows are `head`, with the columns that `spec` maps.

    Raises where there is none, or more than one in a folder of files.
    """
    sample = [row.values for row in head if isinstance(row, RawRow)]
    if not sample:
        assert isinstance(head[0], BrokenRow)
        raise head[0].error()
    fields = [name for shape in SHAPES for name in (*shape.required, *shape.optional)]
    check_mapping(sample, spec.column_map, fields, str(source.path))
    check_one_format(source, spec)
    mapped = [apply_mapping(values, spec.column_map) for values in sample]
    detection = detect_format(mapped, file=str(source.path), wanted=spec.format)
    check_limits(mapped, detection.format, spec, str(source.path))
    return detection


def check_one_format(source: Source, spec: DataPreparationSpec) -> None:
    """Raise where files of a folder have different formats, or one has none. The beginning of each is read."""
    files_of: dict[DatasetFormat, list[str]] = {}
    for file, rows in source.each_file():
        sample = [apply_mapping(row.values, spec.column_map) for row in first_rows(rows) if isinstance(row, RawRow)]
        if sample:
            found = detect_format(sample, file=str(file.path), wanted=spec.format)
            files_of.setdefault(found.format, []).append(file.name)
    if len(files_of) > 1:
        listed = "; ".join(f"{format}: {shortened(names)}" for format, names in files_of.items())
        raise InvalidData(
            f"{source.path} holds files of different formats ({listed}), expected one format in a folder",
            hint="import the files one by one, or sort them into a folder for each format; --format says which it is "
            "where the columns fit several",
        )


def shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_FILES} more" if len(names) > SHOWN_FILES else ""
    return ", ".join(names[:SHOWN_FILES]) + more


def check_limits(
    rows: Sequence[Mapping[str, Any]], format: DatasetFormat, spec: DataPreparationSpec, source: str
) -> None:
    """Raise for a limit on a field that neither the rows nor their format have: it would limit nothing."""
    columns = dict.fromkeys(name for row in rows for name in row)
    known = {
        *columns,
        *(name for shape in SHAPES if shape.format == format for name in shape.required + shape.optional),
    }
    for option, limits in (("--min-chars", spec.min_chars), ("--max-chars", spec.max_chars)):
        for field in limits:
            if field not in known:
                raise InvalidSpec(
                    f"{option} names the field {field!r}, which {source} does not have{did_you_mean(field, known)}",
                    hint=f"its fields: {', '.join(columns)}",
                )
