"""Read the examples of a dataset's part."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from lorasmith.errors import InvalidData, NotFound
from lorasmith.schemas.data import Example


def read_examples(path: Path) -> list[Example]:
    """The examples of a JSONL file. Raises `InvalidData` naming the file, the line and the field."""
    if not path.is_file():
        raise NotFound(f"no examples file {path}")
    with path.open("rb") as handle:
        return [parse_example(line, path, number) for number, line in enumerate(handle, start=1)]


def has_conversations(path: Path) -> bool:
    """Whether any line of the file holds messages, which need a chat template."""
    if not path.is_file():
        raise NotFound(f"no examples file {path}")
    with path.open("rb") as handle:
        return any(
            b'"messages"' in line and parse_example(line, path, number).messages is not None
            for number, line in enumerate(handle, start=1)
        )


def parse_example(line: bytes, path: Path, number: int) -> Example:
    """The example of that line of the file. Raises `InvalidData` naming the file, the line and the field."""
    try:
        return Example.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the line"
        raise InvalidData(f"{path}, line {number}: {field}: {first['msg']}") from error
