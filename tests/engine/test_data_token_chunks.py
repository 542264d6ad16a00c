"""Copies of a process that tokenise: the same store as without them, and none is left behind."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data import token_chunks
from lorasmith.engine.data.token_chunks import Chunks, Lines
from lorasmith.engine.data.token_store import PARTIAL, StoreWriter
from lorasmith.engine.data.tokenizing import tokenized
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import Interrupted, InvalidData
from tests.engine.small_jobs import counting_examples, events, write_examples
from tests.waiting import gone, until


@pytest.fixture
def report(tmp_path: Path) -> Reporter:
    return Reporter(tmp_path)


@pytest.fixture
def stops(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Three copies of this process tokenise even a small file; their process ids, as they are started."""
    monkeypatch.setattr(token_chunks, "CHUNK_ROWS", 8)
    monkeypatch.setattr(token_chunks, "BYTES_BEFORE_COPIES", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    started: list[int] = []
    fork = os.fork

    def noted() -> int:
        child = fork()
        if child:
            started.append(child)
        return child

    monkeypatch.setattr(os, "fork", noted)
    return started


@pytest.mark.parametrize("rows", [0, 1, 8, 50])
def test_copies_of_the_process_make_the_same_store(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, stops: set[int], report: Reporter, copies: list[int], rows: int
) -> None:
    path = write_examples(tmp_path / "train.jsonl", counting_examples(rows))
    store = tokenized(path, tmp_path / "copies", tokenizer, stops, report)
    assert len(copies) == 3
    with pytest.MonkeyPatch.context() as alone:
        alone.setattr(torch, "get_num_threads", lambda: 1)
        expected = tokenized(path, tmp_path / "alone", tokenizer, stops, report)
    assert len(store) == rows
    for name in ("tokens.bin", "rows.bin"):
        assert (store.folder / name).read_bytes() == (expected.folder / name).read_bytes()
    assert all(map(gone, copies))
    assert len(copies) == 3


def test_a_row_that_a_copy_cannot_take_is_named_and_the_rows_before_it_are_kept(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, stops: set[int], report: Reporter, copies: list[int]
) -> None:
    path = write_examples(tmp_path / "train.jsonl", counting_examples(43))
    with path.open("a") as handle:
        handle.write('{"id": "1"}\n')
    with pytest.raises(InvalidData, match=r"train.jsonl, line 44: group: Field required"):
        tokenized(path, tmp_path / "tokens", tokenizer, stops, report)
    assert all(map(gone, copies))
    (partial,) = (tmp_path / "tokens").glob(f"*{PARTIAL}")
    assert len((partial / "journal.jsonl").read_text().splitlines()) == 5
    assert not (tmp_path / "events.jsonl").exists()  # no warning


def test_a_copy_that_is_killed_is_named_and_its_rows_are_made_without_it(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    stops: set[int],
    report: Reporter,
    copies: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, parent = write_examples(tmp_path / "train.jsonl", counting_examples(100)), os.getpid()
    expected = tokenized(path, tmp_path / "whole", tokenizer, stops, report)
    make = Chunks.make

    def killed(self: Chunks, given: Lines) -> Any:
        if os.getpid() != parent and given.number == 8 * 4 + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, given)

    monkeypatch.setattr(Chunks, "make", killed)
    store = tokenized(path, tmp_path / "tokens", tokenizer, stops, report)
    assert np.array_equal(store.tokens, expected.tokens)
    assert np.array_equal(store.offsets, expected.offsets)
    assert [event["text"] for event in events(tmp_path, "warning")] == [
        "a process that tokenizes was ended; its rows are tokenized without it"
    ]
    assert all(map(gone, copies))


def test_copies_that_cannot_be_started_are_done_without(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    stops: set[int],
    report: Reporter,
    copies: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, fork = write_examples(tmp_path / "train.jsonl", counting_examples(100)), os.fork
    expected = tokenized(path, tmp_path / "whole", tokenizer, stops, report)
    copies.clear()

    def second_fails() -> int:
        if copies:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", second_fails)
    store = tokenized(path, tmp_path / "tokens", tokenizer, stops, report)
    assert np.array_equal(store.tokens, expected.tokens)
    assert len(copies) == 1
    assert [event["text"] for event in events(tmp_path, "warning")] == [
        "rows are tokenized by fewer processes: Resource temporarily unavailable"
    ]


def test_a_stop_ends_the_copies_and_what_was_made_goes_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, stops: set[int], copies: list[int]
) -> None:
    path, report = write_examples(tmp_path / "train.jsonl", counting_examples(100)), Reporter(tmp_path)
    report.stop_requested = True
    with pytest.raises(Interrupted, match="stopped after tokenizing 8 of 100 rows"):
        tokenized(path, tmp_path / "tokens", tokenizer, stops, report)
    assert all(map(gone, copies))
    report.stop_requested = False
    store = tokenized(path, tmp_path / "tokens", tokenizer, stops, report)
    assert store.numbers.tolist() == list(range(1, 101))


def test_the_copies_of_a_killed_process_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, stops: set[int], report: Reporter, copies: list[int]
) -> None:
    path = write_examples(tmp_path / "train.jsonl", counting_examples(20_000))
    parent = os.fork()
    if parent == 0:
        chunks = Chunks(path, StoreWriter(tmp_path / "store"), tokenizer, stops).tokenized(3, report)
        next(chunks)
        (tmp_path / "copies").write_text(" ".join(map(str, copies)))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    orphans = [int(number) for number in (tmp_path / "copies").read_text().split()]
    assert len(orphans) == 3
    until(lambda: all(gone(process) for process in orphans))
