"""The token store: the same rows as in memory, made once, continued after a stop, and never used when it is damaged."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lorasmith.engine.data import token_chunks, tokenizing
from lorasmith.engine.data.checks import CheckFailed
from lorasmith.engine.data.parts import RenderedPart, render_part, stored_part
from lorasmith.engine.data.rendering import encode
from lorasmith.engine.data.token_store import PARTIAL
from lorasmith.engine.data.tokenizing import KEPT_STORES, tokenized
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import DiskFull, Interrupted, InvalidData, InvalidSpec
from lorasmith.schemas.data import Example, TooLong
from lorasmith.starter.location import starter_model
from tests.engine.chat_templates import SHAPES, conversation, shaped_tokenizer
from tests.engine.small_jobs import assert_same_bits, counting_examples, events, run_engine, write_examples

WORDS = ["one", " space", "\n\n lines", "é世界🙂", "end \n", "def f(x):\n\treturn x", "  ", "a" * 70]


def mixed_examples(*, system: bool) -> list[Example]:
    """Conversations of one to three exchanges with odd white space, and some plain texts."""
    rows = []
    for number in range(40):
        turns = [("system", "Be brief.")] if system and number % 3 == 0 else []
        for exchange in range(1 + number % 3):
            turns += [
                ("user", f"{WORDS[number % 8]} {number}?"),
                ("assistant", f"{exchange} {WORDS[(number + exchange) % 7]}."),
            ]
        rows.append(conversation(*turns, row=number + 1))
    texts = [Example(id="t", group="t", row=41 + number, text=text) for number, text in enumerate(WORDS)]
    return rows + texts


def tokens_of(part: RenderedPart) -> list[tuple[int, list[int], list[bool]]]:
    return [(row.row, row.ids, row.trained) for row in part.rows]


def reference(tokenizer: PreTrainedTokenizerBase, example: Example, stops: set[int]) -> tuple[list[int], list[bool]]:
    """Ids and labels of a conversation by one call of transformers for each piece of text."""
    messages = [message.for_template() for message in example.messages or []]
    ids: list[int] = []
    trained: list[bool] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
            assert isinstance(before, str)
            assert isinstance(after, str)
            context, answer = encode(tokenizer, before[len(done) :]), encode(tokenizer, after[len(before) :])
            stop = next(place for place, token in enumerate(answer) if token in stops)
            ids += context + answer
            trained += [False] * len(context) + [place <= stop for place in range(len(answer))]
            done = after
    return ids, trained


@pytest.fixture
def report(tmp_path: Path) -> Reporter:
    return Reporter(tmp_path)


@pytest.fixture
def examples_file(tmp_path: Path) -> Path:
    return write_examples(tmp_path / "train.jsonl", counting_examples(50))


def stops_of(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SHAPES)
def test_stored_rows_are_those_of_one_call_for_each_text(tmp_path: Path, report: Reporter, name: str) -> None:
    tokenizer, stops = shaped_tokenizer(starter_model(), SHAPES[name])
    examples = mixed_examples(system=SHAPES[name].system)
    store = tokenized(write_examples(tmp_path / "val.jsonl", examples), tmp_path / "tokens", tokenizer, stops, report)
    assert len(store) == len(examples)
    for index, example in enumerate(examples):
        row = store.row(index)
        if example.messages is not None:
            assert (row.ids, row.trained) == reference(tokenizer, example, stops)
        else:
            expected = [*tokenizer(example.text)["input_ids"], tokenizer.eos_token_id]
            assert (row.ids, row.trained) == (expected, [True] * len(expected))
        assert row.row == example.row
        assert store.lengths[index] == len(row.ids)
        assert store.trained[index] == sum(row.trained[1:])


@pytest.mark.parametrize("policy", ["right", "left", "split", "drop"])
@pytest.mark.parametrize("name", SHAPES)
def test_a_stored_part_is_the_part_in_memory(tmp_path: Path, report: Reporter, name: str, policy: TooLong) -> None:
    tokenizer, stops = shaped_tokenizer(starter_model(), SHAPES[name])
    examples = mixed_examples(system=SHAPES[name].system)
    path = write_examples(tmp_path / "train.jsonl", examples)
    memory = render_part(tokenizer, examples, stops, max_tokens=56, too_long=policy)
    stored = stored_part(path, tmp_path, tokenizer, stops, report, max_tokens=56, too_long=policy)
    assert tokens_of(stored) == tokens_of(memory)
    assert stored.counts() == memory.counts()
    assert stored.dropped + stored.cut + stored.split > 0


def test_a_failed_check_reads_as_in_memory_and_can_be_overridden(
    tmp_path: Path, report: Reporter, tokenizer: PreTrainedTokenizerBase
) -> None:
    examples = counting_examples(4)
    examples += [conversation(("user", "<|im_end|>"), ("assistant", "b"), row=row) for row in (5, 6)]
    path, stops = write_examples(tmp_path / "train.jsonl", examples), stops_of(tokenizer)
    with pytest.raises(CheckFailed) as in_memory:
        render_part(tokenizer, examples, stops, max_tokens=99, too_long="error")
    with pytest.raises(CheckFailed) as stored:
        stored_part(path, tmp_path, tokenizer, stops, report, max_tokens=99, too_long="error")
    assert stored.value.message == in_memory.value.message
    assert "row 5: the user message holds the special token" in stored.value.message
    assert "failed by 2 of 6 rows" in stored.value.message
    part = stored_part(
        path, tmp_path, tokenizer, stops, report, max_tokens=99, too_long="error", allow=["special-token-in-message"]
    )
    assert len(part.rows) == 6
    assert part.overridden == {"special-token-in-message": 2}
    with pytest.raises(InvalidSpec, match="6 of 6 rows are longer than 8 tokens; the longest, row 4, has 31"):
        stored_part(
            path, tmp_path, tokenizer, stops, report, max_tokens=8, too_long="error", allow=["special-token-in-message"]
        )


def test_a_second_run_tokenises_nothing(
    examples_file: Path, tmp_path: Path, report: Reporter, tokenizer: PreTrainedTokenizerBase, monkeypatch: Any
) -> None:
    first = tokenized(examples_file, tmp_path / "tokens", tokenizer, stops_of(tokenizer), report)
    monkeypatch.setattr(token_chunks, "draft_all", None)
    again = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    second = tokenized(examples_file, tmp_path / "tokens", again, stops_of(tokenizer), report)
    assert np.array_equal(first.tokens, second.tokens)


def test_whatever_changes_the_tokens_makes_another_store(
    tmp_path: Path, report: Reporter, tokenizer: PreTrainedTokenizerBase
) -> None:
    path, stops = write_examples(tmp_path / "train.jsonl", counting_examples(5)), stops_of(tokenizer)

    def folder(changed: PreTrainedTokenizerBase, stop_ids: set[int] = stops) -> Path:
        return tokenized(path, tmp_path / "tokens", changed, stop_ids, report).folder

    original = folder(tokenizer)
    template = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    template.chat_template += " "
    token = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    token.add_tokens(["Count"])
    eos = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    eos.eos_token = "<|im_start|>"
    stopping = folder(tokenizer, {*stops, 5})
    write_examples(path, counting_examples(6))
    folders = {original, folder(template), folder(token), folder(eos), stopping, folder(tokenizer)}
    assert len(folders) == 6


def test_the_day_is_part_of_what_a_template_with_a_date_renders(
    tmp_path: Path, report: Reporter, starter: Path, examples_file: Path
) -> None:
    dated = AutoTokenizer.from_pretrained(starter)
    dated.chat_template = "{{ strftime_now('%d %b %Y') }}" + dated.chat_template
    origin = tokenizing.origin(examples_file, dated, {0})
    assert origin["date"]


@pytest.mark.parametrize("damage", ["longer", "flipped", "missing", "manifest"])
def test_a_damaged_store_is_named_and_made_again(
    examples_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, damage: str
) -> None:
    report, stops = Reporter(tmp_path), stops_of(tokenizer)
    store = tokenized(examples_file, tmp_path / "tokens", tokenizer, stops, report)
    good = (store.folder / "tokens.bin").read_bytes()
    match damage:
        case "longer":
            (store.folder / "tokens.bin").write_bytes(good + b"0000")
        case "flipped":
            (store.folder / "tokens.bin").write_bytes(bytes([good[0] ^ 1]) + good[1:])
        case "missing":
            (store.folder / "rows.bin").unlink()
        case "manifest":
            (store.folder / "manifest.json").unlink()
    again = tokenized(examples_file, tmp_path / "tokens", tokenizer, stops, report)
    assert (again.folder / "tokens.bin").read_bytes() == good
    (warning,) = [event["text"] for event in events(tmp_path, "warning")]
    assert warning.startswith(f"the tokens of {store.folder.name} are made again: ")


def test_an_interrupted_tokenisation_goes_on_where_it_stopped(
    examples_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_chunks, "CHUNK_ROWS", 8)
    stops = stops_of(tokenizer)
    whole = tokenized(examples_file, tmp_path / "whole", tokenizer, stops, Reporter(tmp_path))
    report = Reporter(tmp_path)
    report.stop_requested = True
    with pytest.raises(Interrupted, match="stopped after tokenizing 8 of 50 rows, which are kept"):
        tokenized(examples_file, tmp_path / "tokens", tokenizer, stops, report)
    with pytest.raises(Interrupted, match="stopped after tokenizing 16 of 50 rows"):
        tokenized(examples_file, tmp_path / "tokens", tokenizer, stops, report)
    (partial,) = (tmp_path / "tokens").glob(f"*{PARTIAL}")
    with (partial / "tokens.bin").open("ab") as handle:
        handle.write(b"a torn chunk")  # as a crash leaves it
    report.stop_requested = False
    store = tokenized(examples_file, tmp_path / "tokens", tokenizer, stops, report)
    assert np.array_equal(store.tokens, whole.tokens)
    assert np.array_equal(store.offsets, whole.offsets)
    assert [event["text"] for event in events(tmp_path, "note")] == [
        "tokenizing goes on after row 8 of 50",
        "tokenizing goes on after row 16 of 50",
    ]


def test_a_chunk_that_a_crash_left_torn_is_made_again(
    examples_file: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_chunks, "CHUNK_ROWS", 8)
    stops, report = stops_of(tokenizer), Reporter(tmp_path)
    whole = tokenized(examples_file, tmp_path / "whole", tokenizer, stops, report)
    report.stop_requested = True
    for _ in range(3):
        with pytest.raises(Interrupted):
            tokenized(examples_file, tmp_path / "tokens", tokenizer, stops, report)
    (partial,) = (tmp_path / "tokens").glob(f"*{PARTIAL}")
    kept = (partial / "tokens.bin").read_bytes()
    (partial / "tokens.bin").write_bytes(kept[:-4])  # the journal got to the disk before the tokens
    report.stop_requested = False
    store = tokenized(examples_file, tmp_path / "tokens", tokenizer, stops, report)
    assert np.array_equal(store.tokens, whole.tokens)
    assert events(tmp_path, "note")[-1]["text"] == "tokenizing goes on after row 16 of 50"


def test_a_line_that_is_no_example_is_named(
    tmp_path: Path, report: Reporter, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_examples(tmp_path / "train.jsonl", counting_examples(3))
    with path.open("a") as handle:
        handle.write('{"id": "1"}\n')
    with pytest.raises(InvalidData, match=r"train.jsonl, line 4: group: Field required"):
        tokenized(path, tmp_path / "tokens", tokenizer, stops_of(tokenizer), report)


def test_two_runs_at_once_make_one_store(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_chunks, "CHUNK_ROWS", 8)
    path = write_examples(tmp_path / "train.jsonl", counting_examples(300))
    reports = [tmp_path / "run1", tmp_path / "run2"]
    for folder in reports:
        folder.mkdir()
    with ThreadPoolExecutor() as runs:
        stores = list(
            runs.map(
                lambda folder: tokenized(
                    path,
                    tmp_path / "tokens",
                    AutoTokenizer.from_pretrained(starter_model()),
                    stops_of(tokenizer),
                    Reporter(folder),
                ),
                reports,
            )
        )
    assert stores[0].folder == stores[1].folder
    assert len(stores[0]) == len(stores[1]) == 300


def test_a_full_disk_is_named_and_what_is_there_goes_on(
    small_disk: Path, tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    path = write_examples(elsewhere / "train.jsonl", counting_examples(8_000))
    with pytest.raises(DiskFull, match="the disk is full: writing below"):
        tokenized(path, small_disk / "tokens", tokenizer, stops_of(tokenizer), Reporter(elsewhere))


def test_the_stores_of_a_part_are_bounded(
    tmp_path: Path, report: Reporter, tokenizer: PreTrainedTokenizerBase, starter: Path
) -> None:
    path = write_examples(tmp_path / "train.jsonl", counting_examples(3))
    made = []
    for number in range(KEPT_STORES + 2):
        changed = AutoTokenizer.from_pretrained(starter)
        changed.chat_template += " " * number
        store = tokenized(path, tmp_path / "tokens", changed, stops_of(tokenizer), report)
        made.append(store.folder)
        os.utime(store.folder, (0, number))
    assert [folder.exists() for folder in made] == [False] * 2 + [True] * KEPT_STORES


def test_training_from_a_store_makes_the_same_adapter(training_job: Any, qwen2_folder: Path, tmp_path: Path) -> None:
    first, second = training_job(qwen2_folder, "first"), training_job(qwen2_folder, "second")
    for folder in (first, second):
        order = (folder / "job.json").read_text()
        (folder / "job.json").write_text(
            order.replace('"adapter_name"', f'"tokens_folder": "{tmp_path}/tokens", "adapter_name"')
        )
        run_engine(folder)
    assert_same_bits(first, second)
    stores = {path.name.partition("-")[0] for path in (tmp_path / "tokens").iterdir() if path.is_dir()}
    assert stores == {"train", "val"}
    assert not list(tmp_path.rglob(f"*{PARTIAL}"))
