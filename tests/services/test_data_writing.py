"""Rows in other formats: what is written is read back as the same examples, what cannot be written is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import Conflict, InvalidData, InvalidSpec
from lorasmith.schemas.data import DataImportSpec, DatasetFormat, Example
from lorasmith.services.data_conversion import convert
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_rows import RawRow
from lorasmith.services.data_sources import find_dataset
from lorasmith.services.data_writing import ROW_OF, Inexpressible, convert_rows, examples_of_file
from lorasmith.services.workbench import Workbench

EXAMPLES = Path(__file__).parents[2] / "examples"
ASK = {"role": "user", "content": "Weather?"}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn", "days": null}'}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"required": ["city"]}}}]
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("chat", {"input": "a", "output": "b"}),
    ("alpaca", {"instruction": "a", "input": "b", "output": "c", "system": "d"}),
    ("summarization", {"text": "a", "summary": "b"}),
    ("completion", {"text": "a"}),
    ("interactions", {"task": {"description": "a"}, "agent": {"role": "coder"}, "execution": {"output": "b"}}),
    ("sharegpt", {"conversations": [{"from": who, "value": who} for who in ("human", "gpt", "human", "gpt")]}),
    (
        "chatml",
        {
            "messages": [
                ASK,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "sunny", "tool_call_id": "c1"},
                {"role": "assistant", "content": "Sunny.", "weight": 0},
                ASK,
                {"role": "assistant", "content": "Still sunny.", "weight": 1},
            ],
            "tools": TOOLS,
        },
    ),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}),
    ("kto", {"prompt": "a", "completion": "b", "label": "true"}),
]


def example_of(format: str, values: dict[str, Any]) -> Example:
    return convert(RawRow(1, 1, values), DatasetFormat(format))


@pytest.mark.parametrize(("format", "values"), ROWS)
@pytest.mark.parametrize("to", DatasetFormat)
def test_a_row_comes_back_from_every_format_that_can_hold_it(
    format: str, values: dict[str, Any], to: DatasetFormat
) -> None:
    example = example_of(format, values)
    try:
        row = ROW_OF[to](example)
    except Inexpressible:
        assert to != format or format == "sharegpt"
        return
    assert example_of(to, json.loads(json.dumps(row))) == example


@pytest.mark.parametrize(
    ("to", "able"),
    [
        ("chat", {"chat", "alpaca", "summarization", "interactions"}),
        ("classification", {"chat", "summarization"}),
        ("sharegpt", {"chat", "alpaca", "summarization", "interactions", "sharegpt"}),
        ("chatml", {"chat", "alpaca", "summarization", "interactions", "sharegpt", "chatml"}),
        ("completion", {"completion"}),
        ("preference", {"preference"}),
        ("kto", {"kto"}),
    ],
)
def test_which_formats_can_hold_which_rows(to: str, able: set[str]) -> None:
    found = set()
    for format, values in ROWS:
        try:
            ROW_OF[DatasetFormat(to)](example_of(format, values))
            found.add(format)
        except Inexpressible:
            pass
    assert found == able


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet"])
def test_a_dataset_is_written_with_its_parts_and_imported_again_as_the_same(
    workbench: Workbench, tmp_path: Path, name: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    first = import_dataset(workbench, EXAMPLES / "faq.csv", DataImportSpec(name="faq"))
    output = tmp_path / name
    assert convert_rows(workbench, "faq", DatasetFormat.ALPACA, output).written == 8
    again = import_dataset(workbench, output, DataImportSpec(name="again"))
    assert (again.format, again.sha256, again.part_sizes) == ("alpaca", first.sha256, first.part_sizes)
    with pytest.raises(Conflict, match="exists already"):
        convert_rows(workbench, "faq", DatasetFormat.CHAT, output)


MADE_BY = {
    "method": "rephrase",
    "teacher": "big",
    "host": "teacher.example",
    "source": "0" * 16,
    "prompt": "rephrase-1",
    "job": "job_1",
    "time": "2026-01-02T03:04:05Z",
    "accepted_by": "ann",
}


@pytest.mark.parametrize("to", ["chatml", "sharegpt", "alpaca", "chat"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet", "rows.csv"])
def test_who_made_a_row_stays_with_it_or_its_loss_is_counted(
    workbench: Workbench, tmp_path: Path, to: str, name: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if name.endswith("csv") and to in ("chatml", "sharegpt"):
        return  # refused, for their lists
    source = tmp_path / "source.jsonl"
    rows = [{"input": "a", "output": "b"}, {"input": "c", "output": "d", "system": "e", "made_by": MADE_BY}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = convert_rows(workbench, str(source), DatasetFormat(to), tmp_path / name)
    before, after = list(examples_of_file(source)), list(examples_of_file(tmp_path / name))
    assert [one.content() for one in after] == [one.content() for one in before]
    assert before[1].made_by is not None
    if name.endswith("csv"):
        assert [one.made_by for one in after] == [None, None]
        assert sum(result.lost.values()) == 1
        assert "made_by" in next(iter(result.lost))
    else:
        assert [one.made_by for one in after] == [None, before[1].made_by]
        assert not result.lost


def test_what_a_format_cannot_hold_stops_the_writing_or_is_counted(workbench: Workbench, tmp_path: Path) -> None:
    source = tmp_path / "mixed.jsonl"
    turns = [{"role": role, "content": role} for role in ("user", "assistant")]
    rows = [{"messages": turns}, {"messages": [*turns, *turns]}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    output = tmp_path / "out.csv"
    with pytest.raises(InvalidData) as caught:
        convert_rows(workbench, str(source), DatasetFormat.CHAT, output)
    assert caught.value.message == (
        f"row 2 of {source} cannot be written as chat: it has more than one question and one answer"
    )
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == ["mixed.jsonl"]
    result = convert_rows(workbench, str(source), DatasetFormat.CHAT, output, leave_out=True)
    assert (result.written, dict(result.left_out)) == (1, {"more than one question and one answer": 1})
    assert [example.row for example in examples_of_file(output)] == [1]
    with pytest.raises(InvalidSpec, match="CSV cannot hold the lists of chatml"):
        convert_rows(workbench, str(source), DatasetFormat.CHATML, tmp_path / "b.csv")


def test_preferences_are_never_trained_as_answers(workbench: Workbench, tmp_path: Path) -> None:
    source = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(5)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    dataset = import_dataset(workbench, source, DataImportSpec(name="pairs"))
    assert (dataset.format, dataset.kind) == ("preference", "preference")
    with pytest.raises(InvalidData, match="holds pairs of a chosen and a rejected answer"):
        find_dataset(workbench, "pairs")
    with pytest.raises(InvalidData, match="holds pairs"):
        find_dataset(workbench, str(source))
