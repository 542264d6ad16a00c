"""Bodies that are files: to the disk as they come, in pieces, never as a whole in memory."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

import python_multipart
from python_multipart.exceptions import FormParserError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from lorasmith.errors import Conflict, InvalidSpec, TooLarge
from lorasmith.files import disk_errors, new_id
from lorasmith.services.uploads import UPLOADS
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings

WRITE_BYTES = 1024**2  # at once, in a thread: the event loop never waits for the disk
LONGEST_FIELD_BYTES = 64 * 1024
MOST_FIELDS = 20


class Target:
    """A file that is filled in pieces. Raises `TooLarge` for the byte behind `limit`, with nothing of its piece written."""

    def __init__(self, path: Path, offset: int, limit: int, what: str) -> None:
        self.path = path
        self.file: BinaryIO = path.open("r+b")
        self.file.seek(offset)
        self.size = offset
        self.limit = limit
        self.what = what
        self.waiting = bytearray()

    async def write(self, piece: bytes) -> None:
        self.size += len(piece)
        if self.size > self.limit:
            raise TooLarge(f"the file is longer than {self.what} of {self.limit} bytes")
        self.waiting += piece
        if len(self.waiting) >= WRITE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        data, self.waiting = bytes(self.waiting), bytearray()
        await run_in_threadpool(self.put, data)

    def put(self, data: bytes) -> None:
        with disk_errors(self.path):
            self.file.write(data)

    async def close(self) -> None:
        """What has come is on the disk afterwards, whatever ends the request."""
        try:
            await self.flush()
            await run_in_threadpool(self.sync)
        finally:
            self.file.close()

    def sync(self) -> None:
        with disk_errors(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())


@asynccontextmanager
async def received_file(
    request: Request, workbench: Workbench, settings: ServerSettings
) -> AsyncIterator[tuple[Form, Path]]:
    """The form of an upload and its file, whole on the disk until the block ends."""
    form = Form(request)
    incoming = workbench.path(UPLOADS) / f".staging-{new_id('incoming')}"
    await run_in_threadpool(make_empty, incoming)
    try:
        target = Target(incoming, 0, settings.max_upload_bytes, "the limit")
        try:
            async for piece in form.file_pieces():
                await target.write(piece)
        finally:
            await target.close()
        yield form, incoming
    except ClientDisconnect:
        raise Conflict("the connection ended before the file did") from None
    finally:
        await run_in_threadpool(incoming.unlink, missing_ok=True)


def make_empty(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


class Form:
    """A multipart form with one file, `file`. `fields` are the texts; the file's bytes come out of `file_pieces`."""

    def __init__(self, request: Request) -> None:
        kind, options = python_multipart.multipart.parse_options_header(request.headers.get("content-type"))
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise InvalidSpec(
                "a file is uploaded as multipart/form-data", hint="curl -F file=@rows.jsonl -F name=rows …"
            )
        self.stream = request.stream()
        self.fields: dict[str, str] = {}
        self.file_name: str | None = None
        self.ended = False
        self.headers: dict[bytes, bytes] = {}
        self.header_name = self.header_value = b""
        self.part_name: str | None = None
        self.value = bytearray()
        self.pieces: list[bytes] = []
        self.parser = python_multipart.MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self.begin_part,
                "on_header_field": self.add_header_name,
                "on_header_value": self.add_header_value,
                "on_header_end": self.end_header,
                "on_headers_finished": self.end_headers,
                "on_part_data": self.add_data,
                "on_part_end": self.end_part,
                "on_end": self.end,
            },
        )

    async def file_pieces(self) -> AsyncIterator[bytes]:
        """The file's bytes; at its end all fields are known. Raises `InvalidSpec` for a form that breaks off or is none."""
        async for chunk in self.stream:
            try:
                self.parser.write(chunk)
            except FormParserError as error:
                raise InvalidSpec(f"the form is broken: {error}") from None
            pieces, self.pieces = self.pieces, []
            for piece in pieces:
                yield piece
        if not self.ended:
            raise InvalidSpec("the form breaks off before its last boundary")
        if self.file_name is None:
            raise InvalidSpec("the form has no file", hint="its name is `file`: curl -F file=@rows.jsonl …")

    def begin_part(self) -> None:
        self.headers, self.value = {}, bytearray()

    def add_header_name(self, data: bytes, start: int, end: int) -> None:
        self.header_name += data[start:end]

    def add_header_value(self, data: bytes, start: int, end: int) -> None:
        self.header_value += data[start:end]

    def end_header(self) -> None:
        self.headers[self.header_name.lower()] = self.header_value
        self.header_name = self.header_value = b""

    def end_headers(self) -> None:
        _, options = python_multipart.multipart.parse_options_header(self.headers.get(b"content-disposition"))
        self.part_name = options.get(b"name", b"").decode("utf-8", errors="replace")
        if self.part_name == "file":
            if self.file_name is not None:
                raise InvalidSpec("the form has two files, expected one", hint="one request for each file")
            self.file_name = options.get(b"filename", b"").decode("utf-8", errors="replace")
        elif self.part_name in self.fields or len(self.fields) >= MOST_FIELDS:
            raise InvalidSpec(f"the form has the field {self.part_name!r} twice, or more than {MOST_FIELDS} fields")

    def add_data(self, data: bytes, start: int, end: int) -> None:
        if self.part_name == "file":
            self.pieces.append(data[start:end])
            return
        self.value += data[start:end]
        if len(self.value) > LONGEST_FIELD_BYTES:
            raise TooLarge(f"the field {self.part_name!r} is longer than {LONGEST_FIELD_BYTES} bytes")

    def end_part(self) -> None:
        if self.part_name == "file":
            return
        assert self.part_name is not None
        try:
            self.fields[self.part_name] = self.value.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidSpec(f"the field {self.part_name!r} is not UTF-8") from None

    def end(self) -> None:
        self.ended = True
