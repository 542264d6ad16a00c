"""Columns of a file under the names of a format: `--map instruction=question,output=answer`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorasmith.errors import InvalidSpec, did_you_mean

# Other names that public datasets give to a field, without case, spaces and underscores. The most telling first.
SYNONYMS = {
    "instruction": ("question", "prompt", "query", "instruct", "problem", "request", "task", "goal"),
    "input": ("prompt", "query", "question", "user", "request", "human", "source", "message"),
    "output": ("answer", "response", "completion", "reply", "solution", "target", "assistant", "bot", "result"),
    "text": ("content", "document", "article", "body", "sentence", "review", "dialogue", "passage", "sql", "utterance"),
    "label": ("category", "class", "intent", "sentiment", "topic", "labeltext", "labelname", "tag"),
    "summary": ("highlights", "abstract", "tldr", "headline", "title"),
    "messages": ("conversation", "dialog", "dialogue", "turns", "chat", "history"),
    "chosen": ("preferred", "accepted", "chosenresponse", "better"),
    "rejected": ("dispreferred", "rejectedresponse", "worse"),
    "prompt": ("question", "instruction", "query"),
}
# Names of the column in which a benchmark asks, the most telling first.
QUESTIONS = ("question", "turns", "prompt", "query", "problem", "instruction", "ctx", "context", "sentence", "text")
ORDER = ("instruction", "input", "text", "messages", "prompt")  # which shape is tried first, by its first field


def apply_mapping(values: dict[str, Any], column_map: Mapping[str, str]) -> dict[str, Any]:
    """The row with each mapped column under its field's name; a column that the row lacks leaves the field out."""
    if not column_map:
        return values
    taken = {source for source in column_map.values() if source in values}
    result = {name: value for name, value in values.items() if name not in taken and name not in column_map}
    for field, source in column_map.items():
        found, value = look_up(values, source)
        if found:
            result[field] = value
    return result


def look_up(values: Mapping[str, Any], source: str) -> tuple[bool, Any]:
    """The column of that name, or where there is none, `answer.text` as the field `text` of the object `answer`, and
    `turns.0` as the first of the list `turns`."""
    if source in values:
        return True, values[source]
    value: Any = values
    for piece in source.split("."):
        if isinstance(value, Mapping) and piece in value:
            value = value[piece]
        elif isinstance(value, list) and re.fullmatch(r"[0-9]{1,6}", piece) and int(piece) < len(value):
            value = value[int(piece)]
        else:
            return False, None
    return True, value


def check_mapping(
    rows: Sequence[Mapping[str, Any]], column_map: Mapping[str, str], fields: Iterable[str], file: str
) -> None:
    """Raise `InvalidSpec` for a field that no format has, or a column that no row has."""
    known = sorted(set(fields))
    for field, source in column_map.items():
        if field not in known:
            raise InvalidSpec(
                f"--map names the field {field!r}, which no format has{did_you_mean(field, known)}",
                hint=f"field=column, with one of the fields {', '.join(known)}",
            )
        if not any(look_up(row, source)[0] for row in rows):
            columns = list(dict.fromkeys(name for row in rows for name in row))
            raise InvalidSpec(
                f"--map names the column {source!r}, which {file} does not have{did_you_mean(source, columns)}",
                hint=f"its columns: {', '.join(columns)}",
            )


def suggest_mapping(columns: Sequence[str], shapes: Iterable[Sequence[str]]) -> dict[str, str]:
    """Field → column for the first of the shapes whose required fields all have a likely column; empty if none has."""
    ordered = sorted(shapes, key=lambda required: ORDER.index(required[0]) if required[0] in ORDER else len(ORDER))
    for required in sorted(ordered, key=len, reverse=True):  # more fields tell more
        mapping: dict[str, str] = {}
        for field in required:
            free = [column for column in columns if column not in mapping.values()]
            column = field if field in free else likely_column(field, free, whole=len(required) == 1)
            if column is None:
                break
            mapping[field] = column
        else:
            return {field: column for field, column in mapping.items() if field != column}
    return {}


def likely_column(field: str, columns: Sequence[str], *, whole: bool) -> str | None:
    """The column whose name is the field's or a synonym, or unless `whole` ends with one."""
    names = (field, *SYNONYMS.get(field, ()))
    plain = {column: re.sub(r"[\W_]+", "", column.lower()) for column in columns}
    words = {column: re.findall(r"[a-z]+", column.lower()) for column in columns}
    equal = (column for name in names for column in columns if plain[column] == name)
    last = (column for name in names for column in columns if words[column] and words[column][-1] == name)
    return next(equal, None) or (None if whole else next(last, None))


def likely_questions(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns by how likely a benchmark asks in them: telling names first, then those with the most text."""
    columns = list(dict.fromkeys(name for row in rows for name in row))

    def unlikeliness(column: str) -> tuple[int, int]:
        words = re.findall(r"[a-z]+", column.lower())
        named = [place for place, name in enumerate(QUESTIONS) if name in words]
        if named:
            return named[0] + (0 if len(words) == 1 else len(QUESTIONS)), 0
        return 2 * len(QUESTIONS), -sum(map(len, {str(row.get(column)) for row in rows}))

    return sorted(columns, key=unlikeliness)


def mapping_option(mapping: Mapping[str, str]) -> str:
    return "--map " + shlex.quote(",".join(f"{field}={column}" for field, column in mapping.items()))


def parse_mapping(options: Iterable[str]) -> dict[str, str]:
    """`instruction=question,output=Best Answer`; the option may also be given several times."""
    mapping: dict[str, str] = {}
    for pair in (piece for option in options for piece in option.split(",")):
        field, equals, column = (part.strip() for part in pair.partition("="))
        if not (field and equals and column):
            raise InvalidSpec(
                f"--map must be field=column, got {pair!r}", hint="--map instruction=question,output=answer"
            )
        if field in mapping:
            raise InvalidSpec(f"--map names the field {field!r} twice")
        mapping[field] = column
    return mapping
