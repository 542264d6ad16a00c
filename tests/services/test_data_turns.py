"""Calls of tools, weights, preferences and KTO rows: each form that files have, and what makes one unusable."""

from __future__ import annotations

from typing import Any

import pytest

from lorasmith.schemas.data import DatasetFormat, Example
from lorasmith.services.data_conversion import convert
from lorasmith.services.data_formats import SHAPES, detect_format
from lorasmith.services.data_mapping import apply_mapping, parse_mapping, suggest_mapping
from lorasmith.services.data_rows import RawRow
from lorasmith.services.data_turns import BadRow

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
WORSE = {"role": "assistant", "content": "b"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"required": ["x"]}}}


def example_of(values: dict[str, Any]) -> Example:
    return convert(RawRow(1, 1, values), detect_format([values]).format)


def call(arguments: Any = '{"x": 1}', name: str = "f") -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": name, "arguments": arguments}}]}


@pytest.mark.parametrize(
    "values",
    [
        {"messages": [USER, call()], "tools": [TOOL]},
        {"messages": [USER, call({"x": 1})], "tools": '[{"name": "f", "parameters": {"required": ["x"]}}]'},
        {"messages": [USER, {**ANSWER, "content": "", "function_call": {"name": "f", "arguments": '{"x": 1}'}}]},
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "one"},
            ]
        },
    ],
)
def test_each_form_of_a_call_becomes_the_same(values: dict[str, Any]) -> None:
    example = example_of(values)
    assert example.messages is not None
    (found,) = example.messages[1].tool_calls or ()
    assert (found.function.name, found.function.arguments) == ("f", {"x": 1})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, call("{")], "field `messages[1].tool_calls[0].function.arguments`: found broken JSON"),
        (
            [USER, call("[]")],
            "field `messages[1].tool_calls[0].function.arguments`: found a list of 0, expected an object",
        ),
        (
            [USER, call(name="g")],
            "field `messages[1].tool_calls[0].function.name`: found 'g', expected one of the row's",
        ),
        (
            [USER, call("{}")],
            "field `messages[1].tool_calls[0].function.arguments`: found no 'x', expected the arguments",
        ),
        ([USER, call(), USER, ANSWER], "field `messages[2].role`: found user after call, expected tool: the result of"),
        (
            [USER, call(), {"role": "tool", "content": "1", "tool_call_id": "2"}, ANSWER],
            "field `messages[2].tool_call_id`: found '2', expected one of '1'",
        ),
        (  # the id of a call that no file can hold
            [
                USER,
                {**call(), "tool_calls": [{**call()["tool_calls"][0], "id": "\ud800"}]},
                {"role": "tool", "content": "1", "tool_call_id": "2"},
                ANSWER,
            ],
            "field `messages[2].tool_call_id`: found '2', expected one of '\\ud800'",
        ),
        (
            [{**USER, "weight": 0}, ANSWER],
            "field `messages[0].weight`: found the number 0, expected 0 or 1, on an assi",
        ),
        ([USER, {**ANSWER, "weight": 0.5}], "field `messages[1].weight`: found the number 0.5, expected 0 or 1"),
        (
            [USER, {**ANSWER, "weight": 0}],
            "field `messages`: found weight 0 on each assistant turn, expected an answer",
        ),
    ],
)
def test_an_unusable_call_or_weight_names_its_field(messages: list[Any], message: str) -> None:
    with pytest.raises(BadRow) as caught:
        example_of({"messages": messages, "tools": [TOOL]})
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [WORSE]},
    ],
)
def test_each_form_of_a_preference_becomes_the_same(values: dict[str, Any]) -> None:
    example = example_of(values)
    parts = [
        [(m.role, m.content) for m in group or ()] for group in (example.messages, example.chosen, example.rejected)
    ]
    assert parts == [[("user", "q")], [("assistant", "a")], [("assistant", "b")]]


@pytest.mark.parametrize(
    ("values", "format"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, "kto"),
        ({"prompt": "q", "completion": "a", "label": "TRUE"}, "kto"),
        ({"prompt": "q", "completion": "a", "label": "sports"}, "chat"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "messages": [USER, ANSWER]}, "preference"),
    ],
)
def test_preferences_and_kto_are_told_from_plain_answers(values: dict[str, Any], format: str) -> None:
    assert detect_format([values]).format == format
    assert DatasetFormat(format).kind == (format if format != "chat" else "sft")


@pytest.mark.parametrize(
    ("columns", "mapping"),
    [
        (["question", "answer_text"], {}),
        (["Question", "Best Answer", "Category"], {"instruction": "Question", "output": "Best Answer"}),
        (["input", "response"], {"output": "response"}),
        (["user_query", "bot"], {"instruction": "user_query", "output": "bot"}),
        (["document", "highlights"], {"text": "document", "summary": "highlights"}),
        (["review", "sentiment"], {"text": "review", "label": "sentiment"}),
        (["foo", "bar"], {}),
    ],
)
def test_a_mapping_is_offered_for_names_of_public_datasets(columns: list[str], mapping: dict[str, str]) -> None:
    assert suggest_mapping(columns, [shape.required for shape in SHAPES]) == mapping


def test_a_mapping_reaches_into_lists() -> None:
    row = {"question": "q", "answers": {"text": ["a", "b"]}, "turns": ["one"]}
    mapped = apply_mapping(row, {"input": "question", "output": "answers.text.1", "system": "turns.0"})
    assert (mapped["input"], mapped["output"], mapped["system"]) == ("q", "b", "one")
    for missing in ("turns.1", "turns.-1", "turns.x", "turns.0.a", "answers.text.²"):
        assert "output" not in apply_mapping(row, {"output": missing})


def test_a_mapping_renames_columns_and_reaches_into_objects() -> None:
    mapping = parse_mapping(["instruction=q, output=a.text"])
    assert apply_mapping({"q": "1", "a": {"text": "2"}, "output": "old"}, mapping) == {
        "a": {"text": "2"},
        "instruction": "1",
        "output": "2",
    }
