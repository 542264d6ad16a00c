"""From a file of examples to its token store: made once for a tokenizer and template, then read again."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data import encoding, rendering, template_flow, template_forms, words
from lorasmith.engine.data.token_chunks import Chunks
from lorasmith.engine.data.token_store import PARTIAL, StoreWriter, TokenStore
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import InvalidData, NotFound
from lorasmith.files import disk_errors, sha256_bytes, sha256_file, try_lock

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
        "code": [
            sha256_file(Path(str(module.__file__)))
            for module in (rendering, encoding, words, template_flow, template_forms)
        ],
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
    """Tokenise the rest of the file."""
    total = count_lines(examples_file)
    if writer.rows:
        report("note", text=f"tokenizing goes on after row {writer.rows:,} of {total:,}")
    shown_at = time.monotonic()
    chunks = Chunks(examples_file, writer, tokenizer, stop_ids).tokenized(torch.get_num_threads(), report)
    with closing(chunks):
        for chunk in chunks:
            writer.append(chunk)
            if report.stop_requested:
                raise report.stop(f"stopped after tokenizing {writer.rows:,} of {total:,} rows, which are kept")
            if time.monotonic() - shown_at >= REPORT_EVERY_S:
                shown_at = time.monotonic()
                report("progress", condition="tokenizing rows", done=writer.rows, total=total)
    writer.finish(facts)


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
