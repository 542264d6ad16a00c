"""One row to one conversation or text, and what makes a row unusable."""

from __future__ import annotations

from typing import Any

import pytest

from lorasmith.schemas.data import DatasetFormat, Example
from lorasmith.services.data_conversion import (
    DEFAULT_SYSTEM_PROMPT,
    SYSTEM_PROMPTS,
    BadRow,
    convert,
    explicit_part,
    ignored_fields,
)
from lorasmith.services.data_reading import RawRow

Turns = list[tuple[str, str]]


def example_of(values: dict[str, Any], format: str) -> Example:
    return convert(RawRow(number=4, line=5, values=values), DatasetFormat(format))


def turns_of(values: dict[str, Any], format: str) -> Turns:
    return [(message.role, message.content) for message in example_of(values, format).messages or []]


def chatml(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def sharegpt(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("format", "values", "turns"),
    [
        ("alpaca", {"instruction": "Say hi", "input": "", "output": "hi"}, [("user", "Say hi"), ("assistant", "hi")]),
        ("alpaca", {"instruction": "Say hi", "output": "hi"}, [("user", "Say hi"), ("assistant", "hi")]),
        (
            "alpaca",
            {"instruction": "Translate", "input": "Hello", "output": "Bonjour", "system": "Be brief."},
            [("system", "Be brief."), ("user", "Translate\n\nHello"), ("assistant", "Bonjour")],
        ),
        ("chat", {"input": " a ", "output": "b\n"}, [("user", " a "), ("assistant", "b\n")]),
        ("chat", {"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
        ("chat", {"question": "a", "answer": "b"}, [("user", "a"), ("assistant", "b")]),
        ("classification", {"text": "Great!", "label": "positive"}, [("user", "Great!"), ("assistant", "positive")]),
        ("classification", {"text": "Great!", "category": "praise"}, [("user", "Great!"), ("assistant", "praise")]),
        (
            "summarization",
            {"text": "Long.", "summary": "Short."},
            [("user", "Summarize this text:\n\nLong."), ("assistant", "Short.")],
        ),
        (
            "interactions",
            {"task": {"description": "Sort"}, "agent": {"role": "Coder"}, "execution": {"output": "sorted(x)"}},
            [("system", SYSTEM_PROMPTS["coder"]), ("user", "Sort"), ("assistant", "sorted(x)")],
        ),
        (
            "interactions",
            {"task": {"description": "Sing"}, "agent": {"role": "bard"}, "execution": {"output": "la"}},
            [("system", DEFAULT_SYSTEM_PROMPT), ("user", "Sing"), ("assistant", "la")],
        ),
        (
            "interactions",
            {"task": {"description": "Sing"}, "execution": {"output": "la"}},
            [("system", DEFAULT_SYSTEM_PROMPT), ("user", "Sing"), ("assistant", "la")],
        ),
        (
            "sharegpt",
            sharegpt(("system", ""), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")),
            [("system", ""), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
        ),
        (
            "sharegpt",
            {**sharegpt(("human", "a"), ("gpt", "b")), "system": "Be kind."},
            [("system", "Be kind."), ("user", "a"), ("assistant", "b")],
        ),
        (
            "chatml",
            chatml(("user", "a"), ("assistant", "b"), ("tool", ""), ("tool", "c"), ("assistant", "d")),
            [("user", "a"), ("assistant", "b"), ("tool", ""), ("tool", "c"), ("assistant", "d")],
        ),
    ],
)
def test_each_format_becomes_a_conversation(format: str, values: dict[str, Any], turns: Turns) -> None:
    assert turns_of(values, format) == turns


def test_a_completion_stays_a_text() -> None:
    example = example_of({"text": "[INST] 2+2? [/INST] 4"}, "completion")
    assert (example.text, example.messages, example.row) == ("[INST] 2+2? [/INST] 4", None, 4)


@pytest.mark.parametrize(
    ("format", "values", "message"),
    [
        ("alpaca", {"instruction": "a"}, "field `output`: found nothing, expected the answer as text"),
        (
            "alpaca",
            {"instruction": "a", "output": ""},
            "field `output`: found an empty text, expected the answer as text",
        ),
        (
            "chat",
            {"input": "a", "output": " \n"},
            "field `output`: found only white space, expected the answer as text",
        ),
        ("chat", {"question": "a"}, "field `answer`: found nothing, expected the answer as text"),
        ("chat", {"prompt": None, "completion": "b"}, "field `prompt`: found null, expected the user's turn as text"),
        (
            "alpaca",
            {"instruction": "a", "input": ["b"], "output": "c"},
            "field `input`: found a list of 1, expected the context of the instruction, or nothing as text",
        ),
        (
            "classification",
            {"text": "a", "label": 3},
            "field `label`: found the number 3, expected the name of the class as text",
        ),
        ("summarization", {"text": "a", "summary": True}, "field `summary`: found true, expected the summary as text"),
        (
            "completion",
            {"text": "a\ud800"},
            "field `text`: found half of a surrogate pair at character 2, expected valid Unicode text",
        ),
        ("interactions", {"task": "a"}, "field `task`: found 'a', expected an object with description"),
        (
            "interactions",
            {"task": {"description": "a"}, "execution": {"result": "b"}},
            "field `execution.output`: found nothing, expected the answer as text",
        ),
        (
            "interactions",
            {"task": {"description": "a"}, "agent": {"role": 1}, "execution": {"output": "b"}},
            "field `agent.role`: found the number 1, expected a role as text",
        ),
        ("chatml", {"messages": []}, "field `messages`: found a list of 0, expected a list of turns"),
        (
            "chatml",
            {"messages": {"role": "user"}},
            "field `messages`: found an object with role, expected a list of turns",
        ),
        (
            "chatml",
            {"messages": ["hi"]},
            "field `messages[0]`: found 'hi', expected an object with role and content",
        ),
        (
            "chatml",
            chatml(("user", "a")),
            "field `messages`: found no assistant turn among 1, expected an answer as the last turn",
        ),
        (
            "chatml",
            chatml(("asistant", "a")),
            "field `messages[0].role`: found 'asistant'; did you mean 'assistant'?, "
            "expected one of system, user, assistant, tool, developer, function",
        ),
        (
            "chatml",
            chatml(("assistant", "a"), ("user", "b")),
            "field `messages[0].role`: found assistant as the first turn, expected system or user",
        ),
        (
            "chatml",
            chatml(("system", "s"), ("assistant", "a")),
            "field `messages[1].role`: found assistant after system, expected user",
        ),
        (
            "chatml",
            chatml(("user", "a"), ("user", "b"), ("assistant", "c")),
            "field `messages[1].role`: found user after user, expected assistant; join turns of one side",
        ),
        (
            "chatml",
            chatml(("user", "a"), ("assistant", "b"), ("system", "c"), ("assistant", "d")),
            "field `messages[2].role`: found system after assistant, expected user; join turns of one side",
        ),
        (
            "chatml",
            chatml(("user", "a"), ("assistant", "b"), ("user", "c")),
            "field `messages[2]`: found user as the last turn, expected an assistant turn",
        ),
        (
            "chatml",
            chatml(("user", "a"), ("assistant", "  ")),
            "field `messages[1].content`: found only white space, expected the answer as text",
        ),
        (
            "chatml",
            chatml(("user", [{"type": "text", "text": "a"}]), ("assistant", "b")),
            "field `messages[0].content`: found a list of parts, "
            "expected one text; images and other parts cannot be trained",
        ),
        (
            "chatml",
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "field `messages[1].tool_calls[0]`: found an object with id, "
            "expected an object with function: {name, arguments}",
        ),
        (
            "sharegpt",
            sharegpt(("human", "a"), ("bing", "b")),
            "field `conversations[1].from`: found 'bing', expected one of system, user, assistant, tool, human, gpt, "
            "function_call, observation",
        ),
        (
            "sharegpt",
            {**sharegpt(("system", "a"), ("human", "b"), ("gpt", "c")), "system": "d"},
            "field `system`: found a second system prompt beside the one in `conversations`, "
            "expected one system prompt",
        ),
        (
            "completion",
            {"text": "a", "group": ["b"]},
            "field `group`: found a list of 1, expected a name as text",
        ),
    ],
)
def test_an_unusable_row_names_field_found_and_expected(format: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow) as caught:
        example_of(values, format)
    assert caught.value.message == message
    assert message.startswith(f"field `{caught.value.field}`")


def test_the_same_conversation_has_the_same_id_in_each_format() -> None:
    ids = {
        example_of({"input": "a", "output": "b"}, "chat").id,
        example_of({"instruction": "a", "output": "b"}, "alpaca").id,
        example_of(chatml(("user", "a"), ("assistant", "b")), "chatml").id,
        example_of({**sharegpt(("human", "a"), ("gpt", "b")), "group": "g"}, "sharegpt").id,
    }
    # printf '[{"content":"a","role":"user"},{"content":"b","role":"assistant"}]' | sha256sum
    assert ids == {"8a02dbdda04f507f"}


def test_rows_that_ask_the_same_share_a_group_whatever_they_answer() -> None:
    first = example_of({"input": "What  is\nit?", "output": "a"}, "chat")
    second = example_of({"input": "what is it? ", "output": "b"}, "chat")
    other = example_of({"input": "What is that?", "output": "a"}, "chat")
    assert first.group == second.group != other.group


@pytest.mark.parametrize(("group", "stored"), [("ticket 7", "ticket 7"), (7, "7")])
def test_a_row_may_name_its_group(group: str | int, stored: str) -> None:
    assert example_of({"text": "a", "group": group}, "completion").group == stored


@pytest.mark.parametrize("empty", [None, ""])
def test_an_empty_group_or_split_counts_as_none(empty: str | None) -> None:
    assert (
        example_of({"text": "a", "group": empty}, "completion").group == example_of({"text": "a"}, "completion").group
    )
    assert explicit_part({"text": "a", "split": empty}) is None


def test_a_row_may_choose_its_part() -> None:
    assert explicit_part({"split": "val"}) == "val"
    with pytest.raises(BadRow, match="field `split`: found 'validation', expected train, val or test"):
        explicit_part({"split": "validation"})
    with pytest.raises(BadRow, match="field `split`: found a list of 1, expected train, val or test"):
        explicit_part({"split": ["val"]})


@pytest.mark.parametrize(
    ("format", "values", "names"),
    [
        ("completion", {"text": "a", "source": "web", "score": 1}, ["score"]),
        ("chat", {"question": "a", "answer": "b", "input": "c"}, ["input"]),
        (
            "interactions",
            {"task": {"id": 1, "description": "a"}, "execution": {"success": True}},
            ["task.id", "execution.success"],
        ),
        ("chatml", {"messages": [{"role": "user", "content": "a", "name": "Ann"}], "id": 1}, ["messages[].name", "id"]),
    ],
)
def test_fields_that_are_not_used_are_named(format: str, values: dict[str, Any], names: list[str]) -> None:
    assert list(ignored_fields(values, DatasetFormat(format))) == names
