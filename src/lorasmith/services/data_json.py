"""Rows of JSON Lines and of JSON documents, read piece by piece: memory is bounded by the longest row."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lorasmith.errors import InvalidData
from lorasmith.services.data_files import LARGEST_ROW, inner_extension, open_file
from lorasmith.services.data_rows import BrokenRow, RawRow, short_json

CHUNK = 1024 * 1024  # characters
BLANK = re.compile(r"[ \t\n\r]*")
LONGEST_LITERAL = 12  # characters; `-Infinity` and `\uXXXX\uXXXX` cut at the end of a buffer
ROW_KEYS = ("messages", "conversations")  # a document with one of them is itself a row
ONE_OBJECT = "one JSON object a line"
OBJECTS = "a list of objects"
DECODER = json.JSONDecoder(object_pairs_hook=lambda pairs: checked_object(pairs))
PLAIN_DECODER = json.JSONDecoder()


def is_document(path: Path, head: str, rest: Iterator[str]) -> bool:
    """Whether a file that begins with `{` is one JSON document rather than JSON Lines. `head` is its first line."""
    named_json = inner_extension(path) == ".json"
    blank_rest = not any(piece.strip() for piece in rest)
    if is_json(head):
        return named_json and blank_rest
    return named_json or (not blank_rest and head.rstrip().endswith(("{", "[", ",", ":")))


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def jsonl_rows(path: Path, moved: Callable[[int], None], skip: int = 0) -> Iterator[RawRow | BrokenRow]:
    """A row for each line that is not blank; of the first `skip`, a number alone. `moved` is told the position."""
    with open_file(path) as file:
        for row in rows_of_lines(path, file.stream, skip):
            moved(file.position())
            yield row


def rows_of_lines(path: Path, stream: BinaryIO, skip: int) -> Iterator[RawRow | BrokenRow]:
    number = line = 0
    while content := stream.readline(LARGEST_ROW + 1):
        line += 1
        too_long = len(content) > LARGEST_ROW
        if too_long:
            skip_line(stream)
        if line == 1:
            content = content.removeprefix(codecs.BOM_UTF8)
        if not content.strip():
            continue
        number += 1
        if number <= skip:
            yield RawRow(number, line, {})
            continue
        if too_long:
            found = f"found a line of more than {LARGEST_ROW} bytes"
            yield BrokenRow(path, number, line, found, ONE_OBJECT, hint="is the file one JSON document? name it .json")
            continue
        yield read_line(path, number, line, content)


def skip_line(stream: BinaryIO) -> None:
    while (piece := stream.readline(CHUNK)) and not piece.endswith(b"\n"):
        pass


def read_line(path: Path, number: int, line: int, content: bytes) -> RawRow | BrokenRow:
    try:
        text = content.decode().strip("\r\n")
    except UnicodeDecodeError as error:
        return not_utf8(path, number, line, content, error)
    if not text.strip():
        return BrokenRow(path, number, line, "found a line of white space", ONE_OBJECT, hint="remove it")
    try:
        value = DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        return BrokenRow(path, number, line, what_broke(error), ONE_OBJECT, hint=mend_hint(line, text))
    return object_row(path, number, line, value, ONE_OBJECT)


def not_utf8(path: Path, number: int, line: int, content: bytes, error: UnicodeDecodeError) -> BrokenRow:
    found = f"found the byte 0x{content[error.start]:02x}, which is not UTF-8"
    encoding = "utf-16" if line == 1 and content[:2] in (b"\xff\xfe", b"\xfe\xff") else "windows-1252"
    hint = f"iconv -f {encoding} -t utf-8 {path} converts it, if that is its encoding"
    return BrokenRow(path, number, line, found, "UTF-8 text", hint=hint)


def what_broke(error: Exception) -> str:
    match error:
        case json.JSONDecodeError():
            line = error.doc[error.doc.rfind("\n", 0, error.pos) + 1 :].partition("\n")[0]
            found = line[max(error.colno - 21, 0) : error.colno + 20]
            return f"broken JSON at column {error.colno}: {error.msg}, found {found!r}"
        case RecursionError():
            return "found JSON that is nested too deeply"
        case _:
            return f"broken JSON: {error}"


def mend_hint(line: int, text: str) -> str:
    csv_like = line == 1 and text.lstrip()[:1] not in "[{"
    return "if the file is CSV, name it .csv" if csv_like else f"mend line {line}, then run the command again"


def checked_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {repeated!r} stands twice in one object")
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        raise ValueError(f"half of a surrogate pair in one of the keys {list(values)!a}") from None
    return values


def object_row(path: Path, number: int, line: int, value: Any, expected: str) -> RawRow | BrokenRow:
    if isinstance(value, dict):
        return RawRow(number, line, value)
    found = f"found {short_json(value)}"
    return BrokenRow(path, number, line, found, expected, hint=f"mend or remove line {line}")


def json_rows(path: Path, moved: Callable[[int], None]) -> Iterator[RawRow | BrokenRow]:
    """The objects of the document's list, or of the only list in an object such as `{"version": 1, "rows": […]}`."""
    with open_file(path) as file:
        scanner = JsonScanner(path, file.stream)
        first = scanner.peek()
        key = wrapping_key(path, scanner) if first == "{" else None
        if first not in ("{", "["):
            refuse_document(path, f"a {type(scanner.value()[1]).__name__}")
    with open_file(path) as file:  # once more from the start, now that its shape is known
        scanner = JsonScanner(path, file.stream)
        scanner.peek()
        if key in ROW_KEYS:
            line, document = scanner.value()
            yield RawRow(1, line, document)
            return
        if key is not None:
            scanner.enter(key)
        for number, (line, value) in enumerate(scanner.items(), start=1):
            moved(file.position())
            if isinstance(value, ValueError):
                yield BrokenRow(path, number, line, what_broke(value), OBJECTS, hint=mend_hint(line, "{"))
            else:
                yield object_row(path, number, line, value, OBJECTS)
        scanner.finish(wrapped=key is not None)


def wrapping_key(path: Path, scanner: JsonScanner) -> str:
    """The key of the only list in the document; the whole document is read for it."""
    keys = scanner.keys_of_lists()
    row_key = next((key for key in ROW_KEYS if key in keys), None)
    if row_key or len(keys) == 1:
        return row_key or keys[0]
    refuse_document(
        path, f"an object with {len(keys)} lists ({', '.join(keys)})" if keys else "an object without a list"
    )
    raise AssertionError


def refuse_document(path: Path, found: str) -> None:
    raise InvalidData(
        f"{path} holds {found}, expected a list of objects, or an object with a single list",
        hint='write the rows as [{"instruction": "…", "output": "…"}, …], or one object a line in a .jsonl file',
    )


class JsonScanner:
    """Walks through a JSON document of any size; holds one value and a chunk in memory.

    A value is decoded from the buffer; where the buffer may have cut it, more is read and it is decoded again.
    The buffer doubles each time, so that the work stays linear in the size of the value.
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path = path
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer = ""
        self.position = 0
        self.line = 1  # of `counted`
        self.column = 0  # characters between the start of that line and the start of the buffer
        self.counted = 0
        self.ended = False
        self.first = ""  # character of the document

    def fill(self) -> bool:
        """Drop what is done, read more. False at the end of the file."""
        if self.ended:
            return False
        self.count_lines()
        rest = self.buffer[self.position :]
        if len(rest) > LARGEST_ROW:
            self.fail(f"found a value of more than {LARGEST_ROW} characters")
        newline = self.buffer.rfind("\n", 0, self.position)
        self.column = self.position - newline - 1 if newline >= 0 else self.column + self.position
        data = self.stream.read(max(CHUNK, len(rest)))
        self.ended = not data
        try:
            more = self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.line + rest.count("\n") + error.object.count(b"\n", 0, error.start)
            broken = not_utf8(
                self.path, 0, line, error.object[error.start :], UnicodeDecodeError("utf-8", b"", 0, 0, "")
            )
            raise broken.error() from None
        self.buffer, self.position, self.counted = rest + more, 0, 0
        return bool(more) or not self.ended

    def count_lines(self) -> None:
        self.line += self.buffer.count("\n", self.counted, self.position)
        self.counted = self.position

    def peek(self) -> str:
        """The next character that is not blank, which is not taken; empty at the end."""
        while True:
            match = BLANK.match(self.buffer, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.buffer):
                self.first = self.first or self.buffer[self.position]
                return self.buffer[self.position]
            if not self.fill():
                return ""

    def take(self, expected: str, complaint: str) -> None:
        if self.peek() != expected:
            self.fail_at(complaint, self.position)
        self.position += 1

    def value(self) -> tuple[int, Any]:
        """(line, value) of what begins here; in place of an object with a key twice, the `ValueError` that says so."""
        self.peek()
        self.count_lines()
        start = self.line
        while True:
            try:
                value, end = self.decoded()
            except json.JSONDecodeError as error:
                cut = "Unterminated" in error.msg or error.pos >= len(self.buffer) - LONGEST_LITERAL
                if cut and not self.ended:
                    self.fill()
                    continue
                self.fail_at(error.msg, error.pos)
            except RecursionError:
                self.fail("found JSON that is nested too deeply")
            if end == len(self.buffer) and not isinstance(value, dict | list | str) and not self.ended:
                self.fill()  # a number may go on
                continue
            self.position = end
            return start, value

    def decoded(self) -> tuple[Any, int]:
        try:
            return DECODER.raw_decode(self.buffer, self.position)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            try:
                return error, PLAIN_DECODER.raw_decode(self.buffer, self.position)[1]
            except json.JSONDecodeError:
                raise
            except ValueError:  # an integer of more than 4300 digits
                self.fail(what_broke(error))
                raise

    def items(self) -> Iterator[tuple[int, Any]]:
        """(line, value) of each item of the list that begins here."""
        self.take("[", "Expecting value")
        if self.peek() == "]":
            self.position += 1
            return
        while True:
            yield self.value()
            if self.peek() == "]":
                self.position += 1
                return
            self.take(",", "Expecting ',' delimiter")

    def keys(self) -> Iterator[str]:
        """Each key of the object that begins here; its value is to be taken before the next key is asked for."""
        self.take("{", "Expecting value")
        if self.peek() == "}":
            self.position += 1
            return
        while True:
            if self.peek() != '"':
                self.fail_at("Expecting property name enclosed in double quotes", self.position)
            yield str(self.value()[1])
            if self.peek() == "}":
                self.position += 1
                return
            self.take(",", "Expecting ',' delimiter")

    def keys_of_lists(self) -> list[str]:
        """Keys of the object that begins here whose values are lists. Raises where the document is broken."""
        found: list[str] = []
        seen: set[str] = set()
        for key in self.keys():
            if key in seen:
                self.fail(f"broken JSON: the key {key!r} stands twice in one object")
            seen.add(key)
            self.take(":", "Expecting ':' delimiter")
            if self.peek() == "[":
                found.append(key)
                for _ in self.items():
                    pass
            else:
                self.value()
        self.finish(wrapped=False)
        return found

    def enter(self, key: str) -> None:
        """Stand at the value of that key of the object that begins here."""
        for name in self.keys():
            self.take(":", "Expecting ':' delimiter")
            if name == key:
                return
            self.value()

    def finish(self, *, wrapped: bool) -> None:
        """Raises when something follows the document; what follows a list inside it was read before."""
        if not wrapped and self.peek():
            self.fail_at("Extra data", self.position)

    def fail_at(self, complaint: str, position: int) -> None:
        newline = self.buffer.rfind("\n", 0, position)
        column = position - newline if newline >= 0 else self.column + position + 1
        line = self.line + self.buffer.count("\n", self.counted, position)
        end = self.buffer.find("\n", position)
        begin = max(newline + 1, position - 20)
        found = self.buffer[begin : min(end if end >= 0 else len(self.buffer), position + 21)]
        self.fail(f"broken JSON at column {column}: {complaint}, found {found!r}", line)

    def fail(self, what: str, line: int | None = None) -> None:
        line = line or self.line
        raise InvalidData(f"{self.path}:{line}: {what}, expected {OBJECTS}", hint=mend_hint(line, self.first))
