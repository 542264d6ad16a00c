"""`data convert`: examples as rows of any format that can hold them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lorasmith.errors import Conflict, InvalidData, InvalidSpec, MissingExtra
from lorasmith.files import disk_errors
from lorasmith.schemas.data import PARTS, DataPreparationSpec, DatasetFormat, Example, Message
from lorasmith.services.data import read_examples
from lorasmith.services.data_conversion import DEFAULT_SYSTEM_PROMPT, SUMMARY_REQUEST, SYSTEM_PROMPTS, convert
from lorasmith.services.data_detection import detect_source, first_rows
from lorasmith.services.data_reading import Source
from lorasmith.services.data_rows import BrokenRow
from lorasmith.services.data_sources import file_named, named_dataset
from lorasmith.services.data_turns import BadRow

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy

FLAT = {  # formats whose rows are texts alone, and their columns
    DatasetFormat.ALPACA: ("instruction", "input", "output", "system", "group", "split"),
    DatasetFormat.CHAT: ("input", "output", "system", "group", "split"),
    DatasetFormat.CLASSIFICATION: ("text", "label", "group", "split"),
    DatasetFormat.SUMMARIZATION: ("text", "summary", "group", "split"),
    DatasetFormat.COMPLETION: ("text", "group", "split"),
}
AGENT_ROLES = {prompt: role for role, prompt in SYSTEM_PROMPTS.items()}
SEPARATORS = {".csv": ",", ".tsv": "\t"}
NO_ORIGIN = "made_by (method, teacher, reviewer), an object, which a cell of CSV cannot hold"
Row = dict[str, Any]


class Inexpressible(Exception):
    """What the format cannot hold, as a phrase."""


@dataclass
class Conversion:
    """Rows written, how many were left out for each reason, and in how many something of them is not written."""

    written: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)


def convert_rows(
    workbench: Workbench,
    source: str,
    format: DatasetFormat,
    output: Path,
    *,
    leave_out: bool = False,
    force: bool = False,
) -> Conversion:
    """Write the rows of a dataset (with their part and group) or of a file (as they stand, duplicates too).

    Raises `InvalidData` for the first row that the format cannot hold, unless `leave_out`; nothing is written then.
    """
    if output.exists() and not force:
        raise Conflict(f"{output} exists already", hint="choose another --output, or replace it with --force")
    write = writer_of(output, format)
    result = Conversion()
    temporary = output.with_name(f".{output.name}.tmp")
    try:
        with disk_errors(output):
            flat = output.suffix.lower() in SEPARATORS
            write(temporary, rows_of(workbench, source, format, leave_out, result, flat=flat))
        if result.written == 0:
            raise InvalidData(f"no row of {source} can be written as {format}: {', '.join(result.left_out)}")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)
    return result


def rows_of(
    workbench: Workbench, source: str, format: DatasetFormat, leave_out: bool, result: Conversion, *, flat: bool
) -> Iterator[Row]:
    """`flat`: into a file whose cells are texts alone."""
    for example, own in examples_of(workbench, source):
        try:
            row = ROW_OF[format](example)
        except Inexpressible as reason:
            if not leave_out:
                raise InvalidData(
                    f"row {example.row} of {source} cannot be written as {format}: it has {reason}",
                    hint="choose another --to (chatml holds every conversation), or --leave-out",
                ) from None
            result.left_out[str(reason)] += 1
            continue
        result.written += 1
        if example.made_by is not None and flat:
            result.lost[NO_ORIGIN] += 1
        elif example.made_by is not None:
            own = {**own, "made_by": example.made_by.model_dump(mode="json", exclude_none=True)}
        yield {**row, **own}


def examples_of(workbench: Workbench, source: str) -> Iterator[tuple[Example, Row]]:
    """Of a dataset with part and group, or of a file."""
    path = file_named(workbench, source)
    if path is not None:
        yield from ((example, {}) for example in examples_of_file(path))
        return
    dataset = named_dataset(workbench, source)
    for part in PARTS:
        for example in read_examples(workbench, dataset, part):
            yield example, {"group": example.group, "split": part}


def examples_of_file(path: Path) -> Iterator[Example]:
    source = Source.open(path)
    rows = source.rows()
    head = first_rows(rows)
    detection = detect_source(source, head, DataPreparationSpec())
    for row in chain(head, rows):
        if isinstance(row, BrokenRow):
            raise row.error()
        try:
            yield convert(row, detection.format)
        except BadRow as problem:
            raise InvalidData(
                f"{source.place(row)}: row {row.number}, {problem.message}",
                hint=f"mend the row; lorasmith data validate {path} shows all such rows",
            ) from None


def writer_of(output: Path, format: DatasetFormat) -> Callable[[Path, Iterator[Row]], None]:
    writers = {".jsonl": write_jsonl, ".json": write_json, ".parquet": write_parquet}
    extension = output.suffix.lower()
    if extension in writers:
        return writers[extension]
    if extension not in SEPARATORS:
        raise InvalidSpec(
            f"--output must end in .jsonl, .json, .csv, .tsv or .parquet, got {output.name!r}",
            hint="--output rows.jsonl",
        )
    if format not in FLAT:
        raise InvalidSpec(f"CSV cannot hold the lists of {format}", hint="--output rows.jsonl, or another --to")
    return lambda path, rows: write_csv(path, rows, FLAT[format], SEPARATORS[extension])


def open_text(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="")


def write_jsonl(path: Path, rows: Iterator[Row]) -> None:
    with open_text(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_json(path: Path, rows: Iterator[Row]) -> None:
    with open_text(path) as file:
        before = "[\n"
        for row in rows:
            file.write(before + json.dumps(row, ensure_ascii=False))
            before = ",\n"
        file.write("\n]\n")


def write_csv(path: Path, rows: Iterator[Row], columns: tuple[str, ...], separator: str) -> None:
    with open_text(path) as file:
        writer = csv.DictWriter(file, columns, delimiter=separator, restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Iterator[Row]) -> None:
    """Lists and objects inside a row are written as Parquet's own; all rows are held in memory for their types."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("writing Parquet", "data") from None
    found = list(rows)
    if found:
        columns = dict.fromkeys(chain.from_iterable(found))  # pyarrow takes those of the first row alone
        table = pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in found])
        pyarrow.parquet.write_table(table, path)


def own_row(example: Example, format: DatasetFormat) -> Row:
    """The row in the format that it came in; its turns as ChatML where that format cannot hold them again."""
    try:
        return ROW_OF[format](example)
    except Inexpressible:
        return message_rows(example)


def exchange(example: Example) -> tuple[str | None, str, str]:
    """(system prompt, request, answer) of a conversation with one exchange."""
    messages = plain_messages(example)
    system = messages[0].content if messages[0].role == "system" else None
    rest = messages[1:] if system is not None else messages
    if [message.role for message in rest] != ["user", "assistant"]:
        raise Inexpressible("more than one question and one answer")
    return system, rest[0].content, rest[1].content


def plain_messages(example: Example) -> list[Message]:
    """The messages, which are nothing but texts."""
    messages = conversation_of(example)
    if example.tools or any(message.tool_calls or message.role == "tool" for message in messages):
        raise Inexpressible("tools")
    if any(message.weight is not None for message in messages):
        raise Inexpressible("an answer of weight 0")
    return messages


def conversation_of(example: Example) -> list[Message]:
    if example.chosen is not None or example.desirable is not None:
        raise Inexpressible("preferences between answers")
    if example.messages is None:
        raise Inexpressible("a plain text, no conversation")
    return example.messages


def alpaca_row(example: Example) -> Row:
    system, request, answer = exchange(example)
    return {"instruction": request, "input": "", "output": answer, **with_system(system)}


def chat_row(example: Example) -> Row:
    system, request, answer = exchange(example)
    return {"input": request, "output": answer, **with_system(system)}


def with_system(system: str | None) -> Row:
    if system is not None and not system.strip():
        raise Inexpressible("an empty system prompt")
    return {"system": system} if system else {}


def without_system(example: Example) -> tuple[str, str]:
    system, request, answer = exchange(example)
    if system is not None:
        raise Inexpressible("a system prompt")
    return request, answer


def classification_row(example: Example) -> Row:
    text, label = without_system(example)
    return {"text": text, "label": label}


def summarization_row(example: Example) -> Row:
    text, summary = without_system(example)
    if not text.startswith(SUMMARY_REQUEST):
        raise Inexpressible("a request other than for a summary")
    return {"text": text.removeprefix(SUMMARY_REQUEST), "summary": summary}


def interaction_row(example: Example) -> Row:
    system, request, answer = exchange(example)
    if system is None or (system != DEFAULT_SYSTEM_PROMPT and system not in AGENT_ROLES):
        raise Inexpressible("a system prompt of its own, or none")
    agent = {"agent": {"role": AGENT_ROLES[system]}} if system in AGENT_ROLES else {}
    return {"task": {"description": request}, **agent, "execution": {"output": answer}}


def completion_row(example: Example) -> Row:
    if example.text is None:
        raise Inexpressible("turns, which only a chat template makes one text")
    return {"text": example.text}


def chatml_row(example: Example) -> Row:
    conversation_of(example)
    return message_rows(example)


def message_rows(example: Example) -> Row:
    tools = {"tools": example.tools} if example.tools else {}
    return {"messages": [message_row(message) for message in example.messages or ()], **tools}


def message_row(message: Message) -> Row:
    """OpenAI's form, which holds arguments as JSON in a text."""
    row = message.model_dump(exclude_none=True)
    for call in row.get("tool_calls", ()):
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return row


def sharegpt_row(example: Example) -> Row:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = [{"from": names[message.role], "value": message.content} for message in plain_messages(example)]
    return {"conversations": turns}


def preference_row(example: Example) -> Row:
    if example.chosen is None or example.rejected is None:
        raise Inexpressible("no rejected answer")
    if example.tools:
        raise Inexpressible("tools")
    groups = {"prompt": example.messages or [], "chosen": example.chosen, "rejected": example.rejected}
    return {name: [message_row(message) for message in messages] for name, messages in groups.items()}


def kto_row(example: Example) -> Row:
    if example.desirable is None or example.messages is None:
        raise Inexpressible("no word on whether the answer is wanted")
    last = max(index for index, message in enumerate(example.messages) if message.role in ("user", "tool")) + 1
    turns = [message_row(message) for message in example.messages]
    return {"prompt": turns[:last], "completion": turns[last:], "label": example.desirable}


ROW_OF: dict[DatasetFormat, Callable[[Example], Row]] = {
    DatasetFormat.ALPACA: alpaca_row,
    DatasetFormat.SHAREGPT: sharegpt_row,
    DatasetFormat.CHATML: chatml_row,
    DatasetFormat.COMPLETION: completion_row,
    DatasetFormat.INTERACTIONS: interaction_row,
    DatasetFormat.CHAT: chat_row,
    DatasetFormat.CLASSIFICATION: classification_row,
    DatasetFormat.SUMMARIZATION: summarization_row,
    DatasetFormat.PREFERENCE: preference_row,
    DatasetFormat.KTO: kto_row,
}
