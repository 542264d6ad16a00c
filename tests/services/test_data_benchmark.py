"""Items of a benchmark: lists of texts are questions or choices, and what cannot be read is refused with a way that works."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.schemas.data import DataImportSpec, Fate
from lorasmith.services import data
from lorasmith.services.data_benchmark import Item, items_of, items_of_file
from lorasmith.services.data_decontamination import decontaminate
from lorasmith.services.data_duplicates.examples import row_of, whole_text
from lorasmith.services.data_duplicates.leaks import find_contamination
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_mapping import parse_mapping
from lorasmith.services.data_replay import replay
from lorasmith.services.workbench import Workbench

HAWAII = "Compose an engaging travel blog post about a recent trip to Hawaii, with its must-see attractions."
REWRITE = "Rewrite your previous response and start every sentence with the letter A."
SHORT = "Now make it rhyme."
TURNS = [
    {"question_id": 81, "category": "writing", "turns": [HAWAII, REWRITE]},
    {"question_id": 82, "category": "writing", "turns": ["Draft a short e-mail to your supervisor.", SHORT]},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path, mapping: str = "") -> list[Item]:
    return list(items_of_file(path, parse_mapping([mapping] if mapping else [])))


def import_chats(workbench: Workbench, folder: Path, conversations: list[list[str]]) -> None:
    roles = ("user", "assistant")
    rows = [
        {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]}
        for turns in conversations
    ]
    spec = DataImportSpec(name="rows", split=(1, 0, 0))
    import_dataset(workbench, write_rows(folder / "rows.jsonl", rows), spec)


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "question.jsonl", TURNS)


@pytest.mark.parametrize("mapping", ["", "text=turns"])
def test_each_of_the_turns_is_an_item_of_its_own(bench: Path, mapping: str) -> None:
    items = read(bench, mapping)
    assert [(item.example.row, item.element, item.example.text) for item in items] == [
        (1, "turns.0", HAWAII),
        (1, "turns.1", REWRITE),
        (2, "turns.0", "Draft a short e-mail to your supervisor."),
        (2, "turns.1", SHORT),
    ]


def test_the_second_turn_is_found_wherever_a_conversation_holds_it(
    workbench: Workbench, bench: Path, tmp_path: Path
) -> None:
    conversations = [
        ["What is open?", "All of it."],
        [REWRITE.upper(), "All animals are alike."],
        ["Tell me of Rome.", "It is old.", f"{REWRITE} And be brief.", "A city."],
        [
            "Tell me of Pisa.",
            "It leans.",
            SHORT,
            "It leans and cleans.",
        ],  # too short to be looked for as a run of words
        ["Write a prompt.", f"Here is one: {REWRITE}"],
    ]
    import_chats(workbench, tmp_path, conversations)
    report = find_contamination(workbench, "rows", str(bench))
    assert [(hit.row, hit.item, hit.element, hit.kind, hit.compared) for hit in report.hits] == [
        (2, 1, "turns.1", "exact", "question"),
        (3, 1, "turns.1", "words", "question"),
        (4, 2, "turns.1", "exact", "turn"),
        (5, 1, "turns.1", "words", "whole"),
    ]
    assert (report.items, report.held, report.exact, report.words) == (4, 2, 2, 0)


def test_a_conversation_that_only_begins_alike_holds_no_row_without_lists(workbench: Workbench, tmp_path: Path) -> None:
    import_chats(workbench, tmp_path, [["Hello", "Hello!", "What is open?", "All of it."]])
    greeting = write_rows(tmp_path / "greeting.jsonl", [{"input": "Hello", "output": "Good day."}])
    assert find_contamination(workbench, "rows", str(greeting)).held == 0


def test_rows_that_hold_a_turn_are_taken_out_and_the_ledger_says_which(
    workbench: Workbench, bench: Path, tmp_path: Path
) -> None:
    import_chats(workbench, tmp_path, [["What is open?", "All of it."], [REWRITE, "All animals are alike."]])
    decontaminate(workbench, "rows", str(bench))
    (line,) = data.ledger_lines(workbench, "rows", Fate.LEAKS)
    assert (line.row, line.leaks_into) == (2, "question.jsonl item 1 turns.1 (exact)")
    assert replay(workbench, "rows").equal


def test_a_folder_is_a_benchmark_also_when_rows_are_taken_out(workbench: Workbench, tmp_path: Path) -> None:
    import_chats(workbench, tmp_path, [["What is open?", "All of it."], [REWRITE, "All animals are alike."]])
    folder = tmp_path / "mtbench"
    folder.mkdir()
    write_rows(folder / "a.jsonl", TURNS[1:])
    write_rows(folder / "b.jsonl", TURNS[:1])
    decontaminate(workbench, "rows", str(folder))
    (line,) = data.ledger_lines(workbench, "rows", Fate.LEAKS)
    assert line.leaks_into == "mtbench item 2 turns.1 (exact)"
    assert replay(workbench, "rows").equal
    write_rows(folder / "b.jsonl", TURNS)
    step = replay(workbench, "rows").steps[-1]
    assert step.difference is not None
    assert step.difference.startswith(f"the benchmark {folder} changed: its sha256 was ")


def test_choices_are_parts_of_one_item_and_numbers_its_label(tmp_path: Path) -> None:
    rows = [
        {"ctx": "A man is sitting on a roof. he", "endings": ["rips tiles off.", "holds a cube."], "label": 1},
        {"ctx": "A lady walks to a barbell. She", "endings": ["swings.", "lifts the weight."], "label": 0},
    ]
    path = write_rows(tmp_path / "hellaswag.jsonl", rows)
    chosen = read(path, "input=ctx,output=endings")
    assert [item.element for item in chosen] == [None, None]
    assert row_of(chosen[0].example).instruction == rows[0]["ctx"]
    assert whole_text(chosen[0].example) == "A man is sitting on a roof. he\nrips tiles off.\nholds a cube."
    labelled = write_rows(tmp_path / "mmlu.jsonl", [{"question": "What is open?", "choices": ["a", "b"], "answer": 0}])
    assert [whole_text(item.example) for item in read(labelled)] == ["What is open?\n0"]
    truth = write_rows(tmp_path / "boolq.jsonl", [{"question": "Is it open?", "answer": True}])
    assert [whole_text(item.example) for item in read(truth)] == ["Is it open?\ntrue"]


@pytest.mark.parametrize(
    ("row", "mapping"),
    [
        ({"task_id": "1", "prompt": "def f():", "canonical_solution": "return 1"}, "output=canonical_solution,…"),
        ({"key": 1, "prompt": "Write a poem.", "instruction_id_list": ["a", "b"], "kwargs": [{}]}, "text=prompt"),
        ({"sentence_good": "They wore it.", "sentence_bad": "They worn it.", "UID": "irregular"}, "text=sentence_good"),
        ({"ind": 4, "ctx": "A man", "endings": ["a", "b"], "split": "val", "label": 3}, "text=ctx"),
        ({"question": "What?", "mc1_targets": {"a": 1, "b": 0}}, "text=question"),
        ({"input": "Sum up.", "output_1": "a", "output_2": "b", "label": 1}, "output=output_1"),
        ({"n": 1, "wording": "Which of these is it?", "kind": "x"}, "text=wording"),
    ],
)
def test_a_refusal_offers_a_mapping_that_reads_the_rows(tmp_path: Path, row: dict[str, Any], mapping: str) -> None:
    path = write_rows(tmp_path / "bench.jsonl", [row])
    with pytest.raises(InvalidData) as caught:
        read(path)
    offered = re.fullmatch(r"a mapping that looks right: --map (.+)", str(caught.value.hint))
    assert offered is not None
    (option,) = shlex.split(offered[1])
    if not mapping.endswith("…"):
        assert option == mapping
    assert len(read(path, option)) == 1


def test_a_folder_of_files_with_different_columns_is_to_be_given_one_by_one(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"Frage": "Was?"}])
    write_rows(tmp_path / "b.jsonl", [{"Pregunta": "Que?"}])
    with pytest.raises(InvalidData) as caught:
        read(tmp_path)
    assert caught.value.hint == "its files have different columns: give them one by one"


@pytest.mark.parametrize(
    ("row", "message", "hint"),
    [
        (
            {"question": "What?", "answer": None},
            "row 2, field `answer`: found null, expected the answer as text",
            "mend the row, or look for the questions alone: --map text=question",
        ),
        (
            {"question": ["What?", " "], "answer": "x"},
            "row 2, field `question.1`: found only white space, expected what is asked as text",
            "mend the row, or leave it out of the file",
        ),
    ],
)
def test_a_row_that_cannot_be_looked_for_is_named_with_the_way_out(
    tmp_path: Path, row: dict[str, Any], message: str, hint: str
) -> None:
    path = write_rows(tmp_path / "bench.jsonl", [{"question": "Who?", "answer": "Ann"}, row])
    with pytest.raises(InvalidData) as caught:
        read(path)
    assert (caught.value.message, caught.value.hint) == (f"{path}:2: {message}", hint)


def test_turns_that_are_no_texts_are_refused_with_their_field(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "bench.jsonl", [{"turns": ["a", "b"]}, {"turns": ["a", 7]}])
    with pytest.raises(InvalidData) as caught:
        read(path, "text=turns")
    assert (
        caught.value.message
        == f"{path}:2: row 2, field `text`: found a list of 2, expected the text to train on as text"
    )


def test_a_dataset_has_no_columns_to_map(workbench: Workbench, tmp_path: Path) -> None:
    import_chats(workbench, tmp_path, [["What is open?", "All of it."]])
    with pytest.raises(InvalidSpec) as caught:
        list(items_of(workbench, "rows", {"text": "turns"}))
    assert caught.value.message == "--map is for the columns of a file, and 'rows' is a dataset"
