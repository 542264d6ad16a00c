"""Rows with their numbers and lines, and one clear error for each way in which a file can be wrong."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.errors import InvalidData, NotFound
from lorasmith.services import data_json
from lorasmith.services.data_reading import Source, read_rows
from lorasmith.services.data_rows import RawRow


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(path: Path) -> list[tuple[int, int, dict[str, object]]]:
    return [(row.number, row.line, row.values) for row in read_rows(path)]


def error_of(path: Path) -> InvalidData:
    with pytest.raises(InvalidData) as caught:
        list(read_rows(path))
    assert caught.value.hint
    return caught.value


def test_json_lines_count_rows_without_blank_lines_and_lines_with_them(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "one"}\n\n{"text": "two"}\r\n')
    assert rows_of(path) == [(1, 1, {"text": "one"}), (2, 3, {"text": "two"})]


def test_a_line_separator_inside_a_string_does_not_cut_the_row(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "one\u2028two\u0085three"}\n')
    assert rows_of(path) == [(1, 1, {"text": "one\u2028two\u0085three"})]


def test_a_json_array_tells_the_line_on_which_each_row_begins(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '[\n  {"text": "one"},\n  {\n    "text": "two"\n  }, {"text": "three"}\n]\n')
    assert [(number, line) for number, line, _ in rows_of(path)] == [(1, 2), (2, 3), (3, 5)]


def test_an_object_with_a_single_list_is_unwrapped(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '{"version": {"rows": [1]},\n "rows": [{"text": "[one]"},\n {"text": "two"}]}')
    assert rows_of(path) == [(1, 2, {"text": "[one]"}), (2, 3, {"text": "two"})]


def test_a_single_conversation_is_one_row(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '{"messages": [{"role": "user", "content": "hi"}]}')
    assert rows_of(path) == [(1, 1, {"messages": [{"role": "user", "content": "hi"}]})]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.csv"])
def test_the_content_decides_between_json_and_json_lines(tmp_path: Path, name: str) -> None:
    lines = write(tmp_path, name, '{"text": "one"}\n{"text": "two"}\n')
    assert [values for _, _, values in rows_of(lines)] == [{"text": "one"}, {"text": "two"}]
    array = write(tmp_path, name, '[{"text": "one"},\n {"text": "two"}]')
    assert [values for _, _, values in rows_of(array)] == [{"text": "one"}, {"text": "two"}]


def test_csv_rows_span_lines_and_keep_quotes_commas_and_blanks(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'input,output\r\n"a\nb","say ""hi"", ok"\r\n\r\n c ,d\r\n')
    assert rows_of(path) == [
        (1, 2, {"input": "a\nb", "output": 'say "hi", ok'}),
        (2, 5, {"input": " c ", "output": "d"}),
    ]


@pytest.mark.parametrize(("name", "content"), [("a.csv", "text,label\nfine,good\n"), ("a.json", '[{"text": "fine"}]')])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path, name, content.encode("utf-8-sig"))
    assert "text" in rows_of(path)[0][2]


def test_a_csv_field_may_be_longer_than_the_limit_of_the_csv_module(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text,summary\n" + "x" * 200_000 + ",short\n")
    assert len(str(rows_of(path)[0][2]["text"])) == 200_000


def test_a_column_without_a_name_gets_its_number(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", ",text\n0,fine\n")
    assert rows_of(path)[0][2] == {"column 1": "0", "text": "fine"}


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no file .*nothing\.jsonl"):
        list(read_rows(tmp_path / "nothing.jsonl"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "a.jsonl is empty, expected at least one row"),
        ("a.json", " \n\n", "a.json is empty, expected at least one row"),
        ("a.json", "[]", "a.json holds no rows, expected at least one"),
        ("a.csv", "text,label\n", "a.csv holds no rows, expected at least one"),
        (
            "a.jsonl",
            '{"text": "a"}\n' * 6 + '{"text": "b"\n{"text": "c"}\n',
            "a.jsonl:7: broken JSON at column 13: Expecting ',' delimiter, found '{\"text\": \"b\"', "
            "expected one JSON object a line",
        ),
        (
            "a.json",
            '[\n{"text": "a"},\n{"text" "b"}\n]',
            "a.json:3: broken JSON at column 9: Expecting ':' delimiter, found '{\"text\" \"b\"}', "
            "expected a list of objects",
        ),
        ("a.jsonl", '{"text": "a"}\n[1, 2]\n', "a.jsonl:2: found [1, 2], expected one JSON object a line"),
        ("a.json", '["a"]', 'a.json:1: found "a", expected a list of objects'),
        (
            "a.json",
            '{"text": "a"}',
            "a.json holds an object without a list, expected a list of objects, or an object with a single list",
        ),
        (
            "a.json",
            '{"a": [], "b": []}',
            "a.json holds an object with 2 lists (a, b), expected a list of objects, or an object with a single list",
        ),
        (
            "a.jsonl",
            '{"text": "a", "text": "b"}',
            "a.jsonl:1: broken JSON: the key 'text' stands twice in one object, expected one JSON object a line",
        ),
        (
            "a.jsonl",
            '{"\\ud800": "a"}',
            "a.jsonl:1: broken JSON: half of a surrogate pair in one of the keys ['\\ud800'], "
            "expected one JSON object a line",
        ),
        (
            "a.jsonl",
            '{"text": ' + "[" * 100_000,
            "a.jsonl:1: found JSON that is nested too deeply, expected one JSON object a line",
        ),
        (
            "a.csv",
            "input,output\nyes, please,ok\n",
            "a.csv:2: found 3 columns, expected 2 as in the header (input, output)",
        ),
        (
            "a.csv",
            'input,output\n"a\nb",c\nd\n',
            "a.csv:4: found 1 column, expected 2 as in the header (input, output)",
        ),
        (
            "a.csv",
            'input,output\na,"b\nc,d\n',
            "a.csv:2: broken CSV in the row that begins here: unexpected end of data",
        ),
        ("a.csv", "text,text\na,b\n", "a.csv:1: the header names 'text' more than once, expected unique names"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "caf\xe9"}\n',
            "a.jsonl:2: found the byte 0xe9, which is not UTF-8, expected UTF-8 text",
        ),
        (
            "a.jsonl",
            '{"text": "a"}'.encode("utf-16"),
            "a.jsonl:1: found the byte 0xff, which is not UTF-8, expected UTF-8 text",
        ),
        (
            "a.csv",
            b"text\n\xcf\xf0\xe8\xe2\xe5\xf2\n",
            "a.csv:2: found the byte 0xcf, which is not UTF-8, expected UTF-8 text",
        ),
        (
            "a.docx",
            b"PK",
            "a.docx has the extension '.docx', expected a JSON array (.json), JSON Lines (.jsonl, .ndjson) or CSV "
            "(.csv, .tsv), plain or with .gz or .zst, or Parquet",
        ),
        ("a.jsonl.gz", b"\x1f\x8b\x08 cut off", "a.jsonl.gz is not a whole gzip file: "),
    ],
)
def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    found = error_of(write(tmp_path, name, content)).message
    assert found.startswith(f"{tmp_path}/{message}") if message.endswith(": ") else found == f"{tmp_path}/{message}"


@pytest.mark.parametrize(
    ("name", "content", "hint"),
    [
        ("a.json", "input,output\na,b\n", "if the file is CSV, name it .csv"),
        ("a.csv", "input,output\nyes, please,ok\n", 'put quotes around a value that contains a comma: "yes, please"'),
        ("a.csv", "input,output\nyes\n", "an empty value still needs its comma"),
        ("a.xlsx", b"PK", "save the sheet as CSV UTF-8"),
    ],
)
def test_the_hint_names_the_way_out(tmp_path: Path, name: str, content: str | bytes, hint: str) -> None:
    assert error_of(write(tmp_path, name, content)).hint == hint


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "notes.txt", "hello")
    assert error_of(tmp_path).message.startswith(f"{tmp_path} is a folder without a file to import, expected a JSON")
    write(tmp_path, "rows.txt.bz2", b"BZh9")
    assert error_of(tmp_path).hint == "it holds rows.txt.bz2: unpack it first: bunzip2 FILE"


def test_a_folder_gives_the_rows_of_its_files_by_name_and_each_file_its_part(tmp_path: Path) -> None:
    write(tmp_path, "test.csv", "text\nthree\n")
    write(tmp_path, "data-00.jsonl", '{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "validation").mkdir()
    write(tmp_path / "validation", "rows.json", '[{"text": "four"}]')
    write(tmp_path, ".hidden.jsonl", "{")
    rows = list(read_rows(tmp_path))
    assert [(row.number, row.file, row.line, row.part) for row in rows] == [
        (1, "data-00.jsonl", 1, None),
        (2, "data-00.jsonl", 3, None),
        (3, "test.csv", 2, "test"),
        (4, "validation/rows.json", 1, "val"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "values", "notes"),
    [
        ("a.csv", "input;output\na;b,c\n", {"input": "a", "output": "b,c"}, ["separated by semicolons"]),
        ("a.csv", "sep=|\ninput|output\na|b\n", {"input": "a", "output": "b"}, ["separated by bars"]),
        ("a.tsv", "input\toutput\na\tb\n", {"input": "a", "output": "b"}, []),
        ("a.csv", "text\nfine".encode("utf-16"), {"text": "fine"}, ["encoding UTF-16 by its byte-order mark"]),
        ("a.csv", b"a,b;c\nx,y;z\n", {"a": "x", "b;c": "y;z"}, []),
        (
            "a.csv",
            "text,label\nun café crème,gut\n".encode("windows-1252"),
            {"text": "un café crème", "label": "gut"},
            ["encoding windows-1252, because the byte 0xe9 on line 2 is not UTF-8"],
        ),
    ],
)
def test_separator_and_encoding_of_csv_are_found_and_said(
    tmp_path: Path, name: str, content: str | bytes, values: dict[str, str], notes: list[str]
) -> None:
    source = Source.open(write(tmp_path, name, content))
    (row,) = source.rows()
    assert isinstance(row, RawRow)
    assert (row.values, source.notes) == (values, notes)


def test_an_encoding_may_be_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "text\nПривет\n".encode("windows-1251"))
    assert "--encoding" in str(error_of(path).hint)
    (row,) = Source.open(path, "windows-1251").rows()
    assert isinstance(row, RawRow)
    assert row.values == {"text": "Привет"}


def test_a_broken_line_among_good_ones_is_one_broken_row(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": \n[1]\n\xff\n{"text": "b"}\n')
    rows = list(Source.open(path).rows())
    assert [(row.number, row.line, type(row).__name__) for row in rows] == [
        (1, 1, "RawRow"),
        (2, 2, "BrokenRow"),
        (3, 3, "BrokenRow"),
        (4, 4, "BrokenRow"),
        (5, 5, "RawRow"),
    ]


def test_rows_may_be_passed_over_to_go_on_where_an_import_stopped(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", "".join(f'{{"text": "{n}"}}\n' for n in range(5)))
    assert [row.number for row in Source.open(path).rows(skip=3)] == [4, 5]


values_of_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.lists(
        st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), values_of_json, max_size=3), min_size=1
    ),
    st.sampled_from([None, 0, 2]),
)
@settings(max_examples=150, deadline=None)
def test_a_document_read_in_tiny_pieces_is_the_document(rows: list[dict[str, Any]], indent: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_json, "CHUNK", 7)
        path = Path(folder) / "a.json"
        for document in (rows, {"version": {"a": 1}, "rows": rows, "next": None}):
            text = json.dumps(document, indent=indent, ensure_ascii=False)
            path.write_text(text, encoding="utf-8")
            read = list(data_json.json_rows(path, lambda position: None))
            assert [row.values for row in read if isinstance(row, RawRow)] == rows
            with pytest.raises(InvalidData):
                path.write_text(text[:-1], encoding="utf-8")
                list(data_json.json_rows(path, lambda position: None))


def test_an_error_far_into_a_document_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_json, "CHUNK", 16)
    rows = "".join(f'{{"text": "{n}"}},\n' for n in range(100))
    found = error_of(write(tmp_path, "a.json", f"[{rows}{{'text': 1}}]")).message
    assert found.startswith(
        f"{tmp_path}/a.json:101: broken JSON at column 2: Expecting property name enclosed in double"
    )


def test_a_packed_file_has_the_rows_of_the_plain_one(tmp_path: Path) -> None:
    content = b'{"text": "one"}\n{"text": "two"}\n'
    plain, packed = write(tmp_path, "a.jsonl", content), write(tmp_path, "b.jsonl.gz", gzip.compress(content))
    assert list(read_rows(packed)) == list(read_rows(plain))
