"""From a file of examples to its token store: made once for a tokenizer and template, then read again."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data import encoding, rendering
from lorasmith.engine.data.checks import ALL_CHECKS
from lorasmith.engine.data.encoding import encoder_of
from lorasmith.engine.data.examples import parse_example
from lorasmith.engine.data.rendering import Draft, Encoded, assemble, draft_all, encode_drafts
from lorasmith.engine.data.token_store import PARTIAL, Chunk, StoreWriter, TokenStore
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import InvalidData, NotFound
from lorasmith.files import disk_errors, sha256_bytes, sha256_file, try_lock
from lorasmith.schemas.data import Example

CHUNK_ROWS = 256
CHUNK_BYTES = 1 << 18  # of lines: with few chunks, rendering and tokenising would not overlap
CHUNKS_AHEAD = 2
KEPT_STORES = 4  # of a file of examples, the last used; each takes about as many bytes as the file
REPORT_EVERY_S = 1.0
TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")


def tokenized(
    examples_file: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], report: Reporter
) -> TokenStore:
    """The rows of the file as tokens, from the store below `folder`, or tokenised into it now.

    A damaged store is named and made again. Raises `InvalidData` for a line that is no example, and `Interrupted` when
    asked to stop: what was tokenised until then is kept.
    """
    if not examples_file.is_file():
        raise NotFound(f"no examples file {examples_file}")
    facts = origin(examples_file, tokenizer, stop_ids)
    target = folder / f"{examples_file.stem}-{sha256_bytes(json.dumps(facts, sort_keys=True).encode())[:24]}"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(lock_file(target), report):
        store = opened(target, report)
        if store is None:
            fill(StoreWriter(target), examples_file, tokenizer, stop_ids, report, facts)
            store = TokenStore(target)
        os.utime(target)
    retire(target, examples_file.stem)
    return store


def origin(examples_file: Path, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]) -> dict[str, Any]:
    """All that ids and labels depend on. Truncation and overridden checks do not change what is stored."""
    template = tokenizer.chat_template
    return {
        "examples_sha256": sha256_file(examples_file),
        "tokenizer": tokenizer_digest(tokenizer),
        "template": template,
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "stop_ids": sorted(stop_ids),
        "code": [sha256_file(Path(str(module.__file__))) for module in (rendering, encoding)],
        **{name: version(name) for name in ("transformers", "tokenizers", "jinja2")},
        **({"date": date.today().isoformat()} if "strftime_now" in json.dumps(template) else {}),
    }


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of what a Rust tokenizer is now, or of the files that another one was read from."""
    if tokenizer.is_fast:
        return sha256_bytes(f"{tokenizer.split_special_tokens}{tokenizer.backend_tokenizer.to_str()}".encode())
    folder = Path(tokenizer.name_or_path)
    files = sorted(path for pattern in TOKENIZER_FILES for path in folder.glob(pattern))
    return sha256_bytes("".join(f"{path.name}:{sha256_file(path)}\n" for path in files).encode())


def opened(target: Path, report: Reporter) -> TokenStore | None:
    """The store, or None where there is none that is whole."""
    if not target.exists():
        return None
    try:
        return TokenStore(target)
    except (InvalidData, NotFound) as error:
        report("warning", text=f"the tokens of {target.name} are made again: {error.message}")
        shutil.rmtree(target)
        return None


def fill(
    writer: StoreWriter,
    examples_file: Path,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: set[int],
    report: Reporter,
    facts: dict[str, Any],
) -> None:
    """Tokenise the rest of the file. Texts are rendered while those before them are tokenised in other threads."""
    total = count_lines(examples_file)
    if writer.rows:
        report("note", text=f"tokenizing goes on after row {writer.rows:,} of {total:,}")
    shown_at = time.monotonic()
    for chunk in encoded_chunks(examples_file, writer, tokenizer):
        rows = assemble(tokenizer, chunk.drafts, chunk.encoded.result(), stop_ids)
        writer.append(Chunk(rows, chunk.offsets, chunk.next_offset))
        if report.stop_requested:
            raise report.stop(f"stopped after tokenizing {writer.rows:,} of {total:,} rows, which are kept")
        if time.monotonic() - shown_at >= REPORT_EVERY_S:
            shown_at = time.monotonic()
            report("progress", condition="tokenizing rows", done=writer.rows, total=total)
    writer.finish(facts)


@dataclass
class CodedChunk:
    """Drafts whose texts are being tokenised."""

    drafts: list[Draft]
    offsets: list[int]
    next_offset: int
    encoded: Future[Encoded]


def encoded_chunks(
    examples_file: Path, writer: StoreWriter, tokenizer: PreTrainedTokenizerBase
) -> Iterator[CodedChunk]:
    """Some chunks ahead of the one that is taken."""
    encoder = encoder_of(tokenizer)
    with ThreadPoolExecutor(1) as thread:
        ahead: deque[CodedChunk] = deque()
        for examples, offsets, next_offset in chunks(examples_file, writer.rows, writer.next_offset):
            drafts = draft_all(tokenizer, examples, ALL_CHECKS)
            encoded = thread.submit(encode_drafts, encoder, drafts)
            ahead.append(CodedChunk(drafts, offsets, next_offset, encoded))
            if len(ahead) > CHUNKS_AHEAD:
                yield ahead.popleft()
        yield from ahead


def chunks(examples_file: Path, rows: int, offset: int) -> Iterator[tuple[list[Example], list[int], int]]:
    """Examples behind the first `rows`, where the line at that offset begins; their offsets, and that of the next line."""
    examples: list[Example] = []
    offsets: list[int] = []
    began = offset
    with examples_file.open("rb") as handle:
        handle.seek(offset)
        for number, line in enumerate(handle, start=rows + 1):
            examples.append(parse_example(line, examples_file, number))
            offsets.append(offset)
            offset += len(line)
            if len(examples) == CHUNK_ROWS or offset - began >= CHUNK_BYTES:
                yield examples, offsets, offset
                examples, offsets, began = [], [], offset
    if examples:
        yield examples, offsets, offset


def count_lines(path: Path) -> int:
    with path.open("rb") as handle:
        return sum(1 for _ in handle)


@contextmanager
def locked(path: Path, report: Reporter) -> Iterator[None]:
    """Alone among the processes of this machine: two runs that need the same tokens make them once."""
    with path.open("ab") as handle:
        while not try_lock(handle.fileno()):
            if report.stop_requested:
                raise report.stop("stopped while another run was tokenizing the same rows")
            time.sleep(0.1)
        yield


def retire(used: Path, stem: str) -> None:
    """Remove the other stores of that file of examples that were not used for longest. Who reads one keeps its bytes."""
    others = [path for path in used.parent.glob(f"{stem}-*") if path.is_dir() and path != used]
    for path in sorted(others, key=lambda path: path.stat().st_mtime, reverse=True)[KEPT_STORES - 1 :]:
        with lock_file(path).open("ab") as handle:
            if try_lock(handle.fileno()):  # nobody is writing it
                shutil.rmtree(path)


def lock_file(store: Path) -> Path:
    return store.with_name(f"{store.name.removesuffix(PARTIAL)}.lock")
