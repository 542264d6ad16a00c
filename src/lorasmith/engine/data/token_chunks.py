"""A file of examples as chunks of tokens, in order, made in copies of this process: a template is Python, which takes one core."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import struct
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.checks import ALL_CHECKS
from lorasmith.engine.data.encoding import encoder_of
from lorasmith.engine.data.examples import parse_example
from lorasmith.engine.data.rendering import assemble, draft_all, encode_drafts
from lorasmith.engine.data.token_store import ROW, Chunk, StoreWriter, chunk_of
from lorasmith.engine.reporting import Reporter

CHUNK_ROWS = 256
CHUNK_BYTES = 1 << 17  # of lines: small, so that the copies end at about the same time
BYTES_BEFORE_COPIES = 1 << 20  # of lines; less than these take a fraction of a second
# Objects more than before, then cycles are looked for: with Python's 700 that took a tenth of the time of short rows.
COLLECT_AFTER = 200_000
PIPE_BYTES = 1 << 20  # of chunks that wait: a copy that is done earlier goes on meanwhile
HEADER = struct.Struct("<QQQ")  # tokens, rows, where the next line begins


@dataclass(frozen=True)
class Lines:
    """Of one chunk, the first of them with its number, counted from 1; where each begins, and the line behind them."""

    lines: list[bytes]
    number: int
    offsets: list[int]
    next_offset: int


class Chunks:
    """What is left of a file of examples behind what a store's writer has."""

    def __init__(
        self, examples_file: Path, written: StoreWriter, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]
    ) -> None:
        self.path, self.rows, self.offset = examples_file, written.rows, written.next_offset
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.encoder = encoder_of(tokenizer)

    def tokenized(self, processes: int, report: Reporter) -> Generator[Chunk, None, None]:
        """Each chunk in order, whatever the number of processes. Raises what making it raises."""
        if processes == 1 or self.path.stat().st_size - self.offset < BYTES_BEFORE_COPIES:
            yield from map(self.make, self.read())
            return
        size, place = self.path.stat().st_size, 0
        with self.copies(processes, report) as pipes:
            while self.offset < size:
                pipe = pipes.get(place % processes)
                chunk = received(pipe) if pipe else None
                if chunk is None:
                    chunk = self.make(next(self.read()))  # where it raises, what made the copy end
                    if pipes.pop(place % processes, None):
                        report("warning", text="a process that tokenizes was ended; its rows are tokenized without it")
                self.rows, self.offset, place = self.rows + len(chunk.index), chunk.next_offset, place + 1
                yield chunk

    def read(self) -> Iterator[Lines]:
        """What is left, in chunks that do not depend on who makes them."""
        lines: list[bytes] = []
        offsets: list[int] = []
        number, offset = self.rows + 1, self.offset
        began = offset
        with self.path.open("rb") as handle:
            handle.seek(offset)
            for line in handle:
                lines.append(line)
                offsets.append(offset)
                offset += len(line)
                if len(lines) == CHUNK_ROWS or offset - began >= CHUNK_BYTES:
                    yield Lines(lines, number, offsets, offset)
                    number, began = number + len(lines), offset
                    lines, offsets = [], []
        if lines:
            yield Lines(lines, number, offsets, offset)

    def make(self, given: Lines) -> Chunk:
        examples = [parse_example(line, self.path, number) for number, line in enumerate(given.lines, given.number)]
        drafts = draft_all(self.tokenizer, examples, ALL_CHECKS)
        rows = assemble(self.tokenizer, drafts, encode_drafts(self.encoder, drafts), self.stop_ids)
        return chunk_of(rows, given.offsets, given.next_offset)

    @contextmanager
    def copies(self, count: int, report: Reporter) -> Iterator[dict[int, BinaryIO]]:
        """By number, a pipe from each copy, which makes every `count`-th chunk and waits while its last one is not taken.

        They are forked, as a new process would first import for seconds. None of them outlives the block, nor, past the
        chunk that it is at, this process.
        """
        pipes: dict[int, BinaryIO] = {}
        with ExitStack() as stack:
            gc.freeze()  # what was loaded before is not looked through in each copy, nor copied for it
            stack.callback(gc.unfreeze)
            for number in range(count):
                read, write = os.pipe()
                with suppress(OSError):  # a user may have only so much memory in pipes
                    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
                pipe = stack.enter_context(os.fdopen(read, "rb"))
                try:
                    child = os.fork()
                except OSError as error:  # too little memory, or too many processes
                    os.close(write)
                    report("warning", text=f"rows are tokenized by fewer processes: {error.strerror}")
                    break
                if child == 0:
                    self.run_copy(number, count, write, [*(other.fileno() for other in pipes.values()), read])
                os.close(write)
                stack.callback(end, child)
                pipes[number] = pipe
            yield pipes

    def run_copy(self, number: int, count: int, write: int, others: list[int]) -> None:
        """Never returns. What is wrong with a row is raised where the chunk is made again."""
        try:
            for reading in others:  # while any copy of its reading end is open, writing into a pipe waits for a reader
                os.close(reading)
            gc.set_threshold(COLLECT_AFTER)
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the threads of this process were not copied
            with os.fdopen(write, "wb") as pipe:
                for place, lines in enumerate(self.read()):
                    if place % count == number:
                        send(self.make(lines), pipe)
        finally:
            os._exit(0)


def send(chunk: Chunk, pipe: BinaryIO) -> None:
    pipe.write(HEADER.pack(len(chunk.tokens), len(chunk.index), chunk.next_offset))
    pipe.write(chunk.tokens.tobytes())
    pipe.write(chunk.index.tobytes())
    pipe.flush()


def received(pipe: BinaryIO) -> Chunk | None:
    """The next chunk, or None where the copy ended before it was whole."""
    header = pipe.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    tokens, rows, next_offset = HEADER.unpack(header)
    parts = pipe.read(tokens * 4), pipe.read(rows * ROW.itemsize)
    if len(parts[1]) < rows * ROW.itemsize:
        return None
    ids: NDArray[np.uint32] = np.frombuffer(parts[0], np.uint32)
    return Chunk(ids, np.frombuffer(parts[1], ROW), next_offset)


def end(child: int) -> None:
    os.kill(child, signal.SIGKILL)  # until it is waited for, the number is no other process's
    os.waitpid(child, 0)
