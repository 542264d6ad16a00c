"""A file to parts and a ledger: no row is lost, no row is counted twice."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.errors import InvalidData
from lorasmith.schemas.data import DataPreparationSpec, DatasetFormat, Fate
from lorasmith.services.data_curation import curate

EXAMPLES = Path(__file__).parents[2] / "examples"
REAL_DATA = Path(__file__).parents[3] / "shared" / "data"


def write_rows(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "format", "num_rows"),
    [
        ("support.jsonl", "chatml", 12),
        ("instructions.jsonl", "alpaca", 8),
        ("conversations.json", "sharegpt", 6),
        ("texts.jsonl", "completion", 8),
        ("interactions.jsonl", "interactions", 8),
        ("faq.csv", "chat", 8),
        ("reviews.csv", "classification", 9),
        ("articles.csv", "summarization", 6),
    ],
)
def test_every_example_file_is_whole_and_of_its_format(name: str, format: str, num_rows: int) -> None:
    data = curate(EXAMPLES / name, DataPreparationSpec(exact=True))
    assert data.detection.format == format
    assert data.fates()[Fate.KEPT] == len(data.ledger) == num_rows
    assert all(data.part_sizes().values())


values = st.sampled_from(["hi", "Hi", " hi ", "h\u00e9", "he\u0301", "", " ", "bye"])
raw_rows = st.lists(st.fixed_dictionaries({"input": values}, optional={"output": values | st.none()}), min_size=1)


@given(raw_rows)
@settings(max_examples=150, deadline=None)
def test_every_input_row_has_exactly_one_ledger_line(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_rows(Path(folder), [*rows, {"input": "always", "output": "good"}])
        data = curate(path, DataPreparationSpec(format=DatasetFormat.CHAT, max_rejected_share=1.0))
    assert [line.row for line in data.ledger] == list(range(1, len(rows) + 2))
    assert [line.line for line in data.ledger] == list(range(1, len(rows) + 2))
    assert sum(data.fates().values()) == len(rows) + 1
    complete = [row for row in rows if (row["input"]).strip() and (row.get("output") or "").strip()]
    assert data.fates()[Fate.REJECTED] == len(rows) - len(complete)
    kept = {line.row: line for line in data.ledger if line.fate == Fate.KEPT}
    assert {example.row: example.id for example in data.examples} == {
        row: line.example_id for row, line in kept.items()
    }
    for line in data.ledger:
        assert (line.part is not None) == (line.fate == Fate.KEPT)
        if line.fate == Fate.EXACT_DUPLICATE:
            assert line.duplicate_of_row in kept
            assert line.duplicate_of_row < line.row


story = " ".join(f"word{n}" for n in range(40))
answers = st.sampled_from([story, story.upper(), f"{story} more", f"{story} more and more", "yes", "Yes", "no", ""])
questions = st.sampled_from(["why", "Why", "how does it work", ""])
groups = st.sampled_from(["a", "b", "c", None])
parts = st.sampled_from(["train", "test", None])
similar_rows = st.lists(
    st.fixed_dictionaries({"input": questions, "output": answers, "group": groups, "split": parts}), max_size=16
)


@given(similar_rows)
@settings(max_examples=60, deadline=None)
def test_near_duplicates_have_a_line_too_and_nothing_of_a_cluster_or_instruction_is_in_two_parts(
    rows: list[dict[str, Any]],
) -> None:
    rows = [{"input": "always", "output": "good", "split": "train"}, *rows]
    with tempfile.TemporaryDirectory() as folder:
        spec = DataPreparationSpec(format=DatasetFormat.CHAT, max_rejected_share=1.0)
        path = write_rows(Path(folder), rows)
        whole, data = (curate(path, spec.model_copy(update={"near_duplicates": near})) for near in (None, 0.8))
    assert [line.row for line in data.ledger] == list(range(1, len(rows) + 1))
    assert sum(data.fates().values()) == len(rows)
    kept = {example.row: example for example in data.examples}
    assert set(kept) == {line.row for line in data.ledger if line.fate == Fate.KEPT}
    group_of = {example.row: example.group for example in whole.examples}
    group_after: dict[str, set[str]] = {}
    for before, line in zip(whole.ledger, data.ledger, strict=True):
        if line.fate == Fate.NEAR_DUPLICATE:
            assert before.fate == Fate.KEPT
            assert line.duplicate_of_row in kept
            assert line.similarity is not None
            assert 0 < line.similarity <= 1
            assert (line.part, line.example_id) == (None, None)
            group_after.setdefault(group_of[line.row], set()).add(kept[line.duplicate_of_row].group)
        else:
            assert line.fate == before.fate
            if line.fate == Fate.KEPT:
                group_after.setdefault(group_of[line.row], set()).add(kept[line.row].group)
    assert all(len(after) == 1 for after in group_after.values())
    by_instruction: dict[str, set[str]] = {}
    for example in data.examples:
        assert example.messages is not None
        by_instruction.setdefault(example.messages[0].content.lower(), set()).add(example.group)
    assert all(len(found) == 1 for found in by_instruction.values())
    if not any(row["split"] for row in rows[1:]):
        parts_of: dict[str, set[str]] = {}
        for part in data.parts:
            for example in data.parts[part]:
                parts_of.setdefault(example.group, set()).add(part)
        assert all(len(found) == 1 for found in parts_of.values())


def test_duplicates_differ_only_in_white_space_and_unicode_form(tmp_path: Path) -> None:
    rows = [
        {"input": "Caf\u00e9  au lait", "output": "ok"},
        {"input": "Cafe\u0301 au\nlait ", "output": " ok"},
        {"input": "caf\u00e9 au lait", "output": "ok"},
        {"input": "Caf\u00e9 au lait", "output": "fine"},
    ]
    data = curate(write_rows(tmp_path, rows), DataPreparationSpec())
    assert [line.fate for line in data.ledger] == ["kept", "exact_duplicate", "kept", "kept"]
    duplicate = data.ledger[1]
    assert (duplicate.duplicate_of_row, duplicate.reason) == (1, "same content as row 1")
    assert len({example.group for example in data.examples}) == 1


def test_bad_rows_stop_the_import_with_the_first_three_and_their_number(tmp_path: Path) -> None:
    rows = [{"input": "a", "output": "b"}] + [{"input": f"question {n}", "output": ""} for n in range(5)]
    path = write_rows(tmp_path, rows)
    with pytest.raises(InvalidData) as caught:
        curate(path, DataPreparationSpec())
    finding = "field `output`: found an empty text, expected the answer as text"
    assert caught.value.message == (
        f"5 of 6 rows of {path} cannot be used, more than the allowed share of 0:\n"
        f"  {path}:2: row 2, {finding}\n"
        f"  {path}:3: row 3, {finding}\n"
        f"  {path}:4: row 4, {finding}\n"
        "  and 2 more"
    )
    assert caught.value.hint == (
        "mend the rows, or leave them out, with a line each in the ledger: lorasmith data import … --max-rejected 0.84"
    )


def test_a_few_bad_rows_may_be_left_out_and_stand_in_the_ledger(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"input": f"question {n}", "output": "yes"} for n in range(39)]
    path = write_rows(tmp_path, [*rows, {"input": "last"}])
    with pytest.raises(InvalidData) as caught:
        curate(path, DataPreparationSpec())
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("--max-rejected 0.05")
    data = curate(path, DataPreparationSpec(max_rejected_share=0.05))
    line = data.ledger[39]
    assert (line.fate, line.field, line.line) == ("rejected", "output", 40)
    assert line.reason == "field `output`: found nothing, expected the answer as text"


def test_a_file_without_a_single_good_row_is_refused_whatever_is_allowed(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"input": "a", "output": ""}])
    with pytest.raises(InvalidData, match=r"^1 of 1 rows of .* cannot be used, so nothing is left:") as caught:
        curate(path, DataPreparationSpec(max_rejected_share=1.0))
    assert caught.value.hint == "mend the rows"


def test_the_field_split_decides_the_part(tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "split": part} for n, part in enumerate(["test", "train", "val", "train"])]
    data = curate(write_rows(tmp_path, rows), DataPreparationSpec())
    assert [line.part for line in data.ledger] == ["test", "train", "val", "train"]


def test_statistics_count_turns_characters_roles_and_unused_fields(tmp_path: Path) -> None:
    messages = [("system", "s"), ("user", "abc"), ("assistant", "de"), ("user", "f"), ("assistant", "ghij")]
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": role, "content": content} for role, content in messages], "score": 1},
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c", "name": "Ann"}]},
    ]
    data = curate(write_rows(tmp_path, rows), DataPreparationSpec())
    assert data.statistics == {
        "examples": 2,
        "turns": {"mean": 3.0, "max": 4},
        "characters": {
            "prompt": {"mean": 4.5, "p50": 2, "p95": 7, "max": 7},
            "answer": {"mean": 2.5, "p50": 1, "p95": 4, "max": 4},
        },
        "roles": {"system": 1, "user": 3, "assistant": 3},
        "ignored_fields": {"score": 1, "messages[].name": 1},
        "split_note": "2 groups cannot fill 3 parts: all are in train",
    }


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real data is not beside the checkout")
@pytest.mark.parametrize(
    ("name", "format", "num_rows"),
    [
        ("text2sql/train.jsonl", "completion", 1000),
        ("gsm8k/train.jsonl", "chat", 7473),
        ("banking77/train.csv", "classification", 10003),
    ],
)
def test_real_files_lose_no_row(name: str, format: str, num_rows: int) -> None:
    data = curate(REAL_DATA / name, DataPreparationSpec())
    assert data.detection.format == format
    assert sum(data.fates().values()) == len(data.ledger) == num_rows
    assert abs(data.part_sizes()["train"] / data.statistics["examples"] - 0.8) < 0.03
