"""`lorasmith data duplicates`, `contamination`, `leakage` and `import --near-duplicates` on small files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasmith.errors import InvalidSpec, LorasmithError
from tests.cli.data_cases import CLIPS, FOX, ROWS, error_of, run, write_chats


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def rows(home: Path, tmp_path: Path) -> str:
    source = write_chats(tmp_path / "rows.jsonl", ROWS, system=" ".join(f"rule {n}" for n in range(100)))
    run(home, "import", source, "--name", "rows", "--split", "100/0/0")
    return source


def test_duplicates_say_which_row_stands_for_which_and_leave_system_prompts_out(home: Path, rows: str) -> None:
    result = run(home, "duplicates", "rows")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[:4] == [
        "dataset rows",
        "rows 7, of which 4 would stay at 0.8, comparing whole",
        "duplicates exact 1, near 2 in 1 cluster",
        "groups 1 with one instruction and different answers",
    ]
    # 24 shingles of three tokens and those 5 more that one word at the end makes: 24 of 29
    assert "1 near 3 0.828" in lines
    assert "6 exact 4 1.000" in lines
    assert "one instruction: rows 4, 5" in lines
    assert "the rows were hashed" in result.stderr


def test_another_threshold_hashes_nothing_again(home: Path, rows: str) -> None:
    first = json.loads(run(home, "duplicates", "rows", "--json").stdout)
    (index,) = home.glob("datasets/*/duplicates/*")
    assert index.name == "whole-rows"
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in index.iterdir()}
    result = run(home, "duplicates", "rows", "--threshold", "0.9", "--json")
    assert "nothing was hashed again" in result.stderr
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in index.iterdir()} == before
    second = json.loads(result.stdout)
    assert (first["hashed"], second["hashed"]) == (True, False)
    assert [(one["row"], one["of"]) for one in first["duplicates"]] == [(1, 3), (2, 3), (6, 4)]
    assert [(one["row"], one["of"]) for one in second["duplicates"]] == [(2, 1), (6, 4)]
    assert second["groups"] == [[1, 3], [4, 5]]
    run(home, "rm", "rows", "--yes")
    assert not list(home.glob("datasets/*"))


def test_each_key_has_an_index_of_its_own(home: Path, rows: str) -> None:
    kept = {
        key: json.loads(run(home, "duplicates", "rows", "--key", key, "--json").stdout)["kept"]
        for key in ("whole", "answer")
    }
    assert kept == {"whole": 4, "answer": 4}
    assert len(list(home.glob("datasets/*/duplicates/*"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("duplicates", "rows", "--threshold", "0.2"), "the similarity threshold must be between 0.4 and 1, got 0.2"),
        (("duplicates", "rows", "--key", "answers"), "--key must be whole, instruction, answer, got 'answers'"),
        (("leakage", "rows", "--similarity", "2"), "the similarity threshold must be between 0.4 and 1, got 2.0"),
        (("import", "x", "--name", "x", "--near-duplicates", "0.2"), "--near-duplicates must be a similarity from 0.4"),
    ],
)
def test_wrong_options_of_a_search_are_refused(home: Path, rows: str, arguments: list[str], message: str) -> None:
    error: LorasmithError = error_of(home, *arguments)
    assert isinstance(error, InvalidSpec)
    assert error.message.startswith(message)
    assert not list(home.glob("datasets/*/duplicates"))


def test_an_import_takes_near_duplicates_out_with_a_line_each(home: Path, tmp_path: Path) -> None:
    source = write_chats(tmp_path / "rows.jsonl", ROWS)
    imported = json.loads(run(home, "import", source, "--name", "less", "--near-duplicates", "0.8", "--json").stdout)
    assert imported["fates"] == {"kept": 4, "exact_duplicate": 0, "near_duplicate": 3, "rejected": 0}
    assert (imported["num_examples"], imported["spec"]["near_duplicates"]) == (4, 0.8)
    ledger = json.loads(run(home, "ledger", "less", "--fate", "near_duplicate", "--json").stdout)
    assert [(line["row"], line["duplicate_of_row"], line["reason"]) for line in ledger] == [
        (1, 3, "similarity 0.83 with row 3"),
        (2, 3, "similarity 0.83 with row 3"),
        (6, 4, "similarity 1.00 with row 4"),
    ]
    assert ledger[0]["similarity"] == 24 / 29
    left = json.loads(run(home, "duplicates", "less", "--json").stdout)
    assert (left["rows"], left["kept"], left["groups"]) == (4, 4, [[4, 5]])


def test_preferences_keep_their_near_duplicates(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    source.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n', encoding="utf-8")
    error = error_of(home, "import", str(source), "--name", "pairs", "--near-duplicates", "0.8")
    assert error.message.startswith("near duplicates are taken out of rows with one answer, and the rows of")
    assert not list(home.glob("datasets/*/train.jsonl"))


def test_contamination_names_row_item_kind_and_text_of_a_file_or_a_dataset(
    home: Path, rows: str, tmp_path: Path
) -> None:
    system = " ".join(f"rule {n}" for n in range(100))  # that of the rows: it matches nothing
    items = [(CLIPS, "no"), ("How old is Ann?", "12"), (f"Listen: {FOX}, yes?", "yes")]
    benchmark = write_chats(tmp_path / "bench.jsonl", items, system=system)
    report = json.loads(run(home, "contamination", "rows", "--benchmark", benchmark, "--json").stdout)
    assert (report["rows"], report["items"], report["held"]) == (7, 3, 2)
    assert [(hit["row"], hit["item"], hit["kind"], hit["compared"]) for hit in report["hits"]] == [
        (1, 3, "words", "whole"),
        (2, 3, "words", "whole"),
        (3, 3, "words", "whole"),
        (7, 1, "exact", "question"),
    ]
    assert report["hits"][0]["text"] == FOX.lower()
    assert report["hits"][3]["text"] == CLIPS.lower()
    printed = run(home, "contamination", "rows", "--benchmark", benchmark).stdout
    assert printed.startswith(
        f"train of rows (7 rows) holds 2 of 3 items of {benchmark}: exact 1, words 1, similar 0\n"
    )
    run(home, "import", benchmark, "--name", "bench")
    stored = json.loads(run(home, "contamination", "rows", "--benchmark", "bench", "--json").stdout)
    assert stored["hits"] == report["hits"]


def test_leakage_finds_held_out_rows_in_train(home: Path, tmp_path: Path) -> None:
    parts = [("train", CLIPS, "72"), ("train", "What is open?", "All."), ("val", CLIPS.upper(), "9"), ("test", FOX, "")]
    source = tmp_path / "rows.jsonl"
    rows = [{"input": question, "output": answer or "ok", "split": part} for part, question, answer in parts]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(home, "import", str(source), "--name", "rows")
    val, test = json.loads(run(home, "leakage", "rows", "--json").stdout)
    assert (val["benchmark"], val["items"], val["held"], val["exact"]) == ("val", 1, 1, 1)
    assert [(hit["row"], hit["item"]) for hit in val["hits"]] == [(1, 3)]
    assert (test["items"], test["held"]) == (1, 0)
    assert "holds 1 of 1 item of val: exact 1" in run(home, "leakage", "rows").stdout


def test_a_benchmark_without_answers_is_looked_for_with_its_columns_mapped(
    home: Path, rows: str, tmp_path: Path
) -> None:
    benchmark = tmp_path / "turns.jsonl"
    items = [{"id": 1, "turns": ["Something else entirely?", CLIPS]}, {"id": 2, "turns": ["One?", "Two?", "Three?"]}]
    benchmark.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    for mapping in ([], ["--map", "text=turns"]):
        printed = run(home, "contamination", "rows", "--benchmark", str(benchmark), *mapping).stdout
        assert f"holds 1 of 5 items of {benchmark}: exact 1" in printed
        assert ["7", "1", "turns.1", "exact", "question"] in [line.split()[:5] for line in printed.splitlines()]
    unmapped = error_of(home, "import", str(benchmark), "--name", "turns")
    assert "has the columns id, turns, expected one of" in unmapped.message
    assert "messages=turns" not in str(unmapped.hint)  # its turns are texts, a conversation's are objects
    held = [
        json.loads(
            run(
                home, "contamination", "rows", "--benchmark", str(benchmark), "--map", f"text=turns.{turn}", "--json"
            ).stdout
        )["hits"]
        for turn in (0, 1)
    ]
    assert [[(hit["row"], hit["item"], hit["kind"]) for hit in hits] for hits in held] == [[], [(7, 1, "exact")]]
    error = error_of(home, "contamination", "rows", "--benchmark", "rows", "--map", "text=turns.1")
    assert error.message == "--map is for the columns of a file, and 'rows' is a dataset"


def test_a_bad_row_of_a_benchmark_is_named_with_its_place(home: Path, rows: str, tmp_path: Path) -> None:
    benchmark = tmp_path / "bench.jsonl"
    benchmark.write_text('{"input": "a", "output": "b"}\n{"input": "a", "output": ""}\n', encoding="utf-8")
    error = error_of(home, "contamination", "rows", "--benchmark", str(benchmark))
    assert error.message == (f"{benchmark}:2: row 2, field `output`: found an empty text, expected the answer as text")


REWORDED = [
    ("How do I reverse a list in Python?", "With reversed."),
    ("In Python, how do I reverse a list?", "Use reversed for that."),
    ("Since I exchange currencies frequently, would you offer me a discount?", "No."),
    ("Would you offer me a discount, since I exchange currencies frequently?", "Sorry, no."),
    ("My card payment was declined twice", "Call us."),
    ("My card payments were declined twice", "Please phone."),
    ("Who wrote the Iliad?", "Homer."),
    ("who wrote the Iliad?", "homer."),
]


def test_the_second_pass_finds_sentences_in_another_order_or_form_that_the_first_does_not(
    home: Path, tmp_path: Path
) -> None:
    run(home, "import", write_chats(tmp_path / "rows.jsonl", REWORDED), "--name", "rows")
    first = json.loads(run(home, "duplicates", "rows", "--key", "instruction", "--json").stdout)
    assert [(one["row"], one["kind"]) for one in first["duplicates"]] == [(8, "exact")]
    semantic = ("duplicates", "rows", "--semantic", "--key", "instruction", "--threshold")
    report = json.loads(run(home, *semantic, "0.6", "--json").stdout)
    assert (report["rows"], report["left_out"], report["threshold"]) == (7, 1, 0.6)
    pairs = report["pairs"]
    assert sorted(pair["rows"] for pair in pairs) == [[1, 2], [3, 4], [5, 6]]
    assert all(pair["cosine"] >= 0.6 and pair["similarity"] < 0.6 for pair in pairs)
    assert pairs == sorted(pairs, key=lambda pair: -pair["cosine"])
    printed = run(home, *semantic, "0.6").stdout
    assert "  row 2: In Python, how do I reverse a list? Use reversed for that.\n" in printed
    assert json.loads(run(home, *semantic, "0.99", "--json").stdout)["pairs"] == []
    error = error_of(home, *semantic, "0.4")
    assert error.message == "the threshold of the cosine must be between 0.5 and 1, got 0.4"
