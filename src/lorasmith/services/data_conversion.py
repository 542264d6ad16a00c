"""One raw row to one canonical example, or the reason why not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from pydantic import ValidationError

from lorasmith.schemas.data import PARTS, DatasetFormat, Example, MadeBy, Message, Part
from lorasmith.services.data_digests import canonical_text, content_id
from lorasmith.services.data_formats import ROW_FIELDS, shape_of
from lorasmith.services.data_preferences import answer_turns, kto_content, preference_content, prompt_turns
from lorasmith.services.data_rows import RawRow
from lorasmith.services.data_turns import (
    USED_TURN_FIELDS,
    BadRow,
    check_calls,
    conversation,
    describe,
    found_at,
    read_tools,
    text_at,
)

SUMMARY_REQUEST = "Summarize this text:\n\n"

DEFAULT_SYSTEM_PROMPT = "You are a helpful assistant that completes the given task carefully and to the point."
SYSTEM_PROMPTS = {  # of collected interactions, by agent.role; other roles get the default
    "coder": "You are an expert software engineer. You write clean, correct and tested code with clear names.",
    "reviewer": "You are an experienced code reviewer. You point out defects and risks and propose concrete fixes.",
    "tester": "You are a software tester. You write tests that state what must be true and cover the edge cases.",
    "debugger": "You are a debugging specialist. You find the cause of a failure before you change anything.",
    "architect": "You are a software architect. You weigh the alternatives and choose the simplest design that works.",
    "planner": "You are a planner. You break a task into small steps that can be done and checked one by one.",
    "researcher": "You are a careful researcher. You separate what is known from what is assumed.",
    "analyst": "You are a data analyst. You answer with figures and say how they were obtained.",
    "writer": "You are a technical writer. You explain clearly, briefly and in the order in which it is needed.",
}

OBJECT_FIELDS = {"task": ("description",), "agent": ("role",), "execution": ("output",)}


def convert(row: RawRow, format: DatasetFormat) -> Example:
    """The canonical example of a row. Texts are kept as they stand; raises `BadRow` when something is missing."""
    values = row.values
    if format == DatasetFormat.COMPLETION:
        text = text_at(values, "text", "the text to train on")
        return Example(
            id=content_id(text), group=group_of(values, text), row=row.number, text=text, made_by=origin_of(values)
        )
    content = CONTENT_OF[format](values)
    messages: list[Message] = content["messages"]
    first_user_turn = next(message.content for message in messages if message.role == "user")
    group, made_by = group_of(values, first_user_turn), origin_of(values)
    example = Example(id="", group=group, row=row.number, made_by=made_by, **content)
    stored = example.content()
    example.id = content_id(stored["messages"] if len(stored) == 1 else stored)
    return example


def group_of(values: Mapping[str, Any], beginning: str) -> str:
    """The row's own `group`, else the digest of its first user turn: rows that ask the same stay together."""
    group = values.get("group")
    if isinstance(group, int) and not isinstance(group, bool):
        group = str(group)
    if group is None or group == "":
        return hashlib.sha256(canonical_text(beginning).lower().encode()).hexdigest()[:16]
    return text_at({"group": group}, "group", "a name")


def explicit_part(values: Mapping[str, Any]) -> Part | None:
    """The part that the row itself asks for."""
    part = values.get("split")
    if part is None or part == "":
        return None
    if part not in PARTS:
        raise BadRow("split", describe(part), "train, val or test")
    return cast(Part, part)


def origin_of(values: Mapping[str, Any]) -> MadeBy | None:
    """Where a row comes from that a teacher wrote, as `data review --apply` says it; a `made_by` that is no object is
    not ours."""
    made_by = values.get("made_by")
    if not isinstance(made_by, dict):
        return None
    try:
        return MadeBy.model_validate(made_by)
    except ValidationError:
        raise BadRow("made_by", describe(made_by), "an object as `data review --apply` writes it") from None


def alpaca_messages(values: Mapping[str, Any]) -> list[Message]:
    instruction = text_at(values, "instruction", "the instruction")
    context = values.get("input")
    if context is not None and (not isinstance(context, str) or context.strip()):
        instruction += "\n\n" + text_at(values, "input", "the context of the instruction, or nothing")
    return [*system_turn(values), *pair(instruction, text_at(values, "output", "the answer"))]


def chat_messages(values: Mapping[str, Any]) -> list[Message]:
    question, answer = shape_of(values, DatasetFormat.CHAT).required
    if isinstance(values.get(question), list):  # prompt and completion as turns
        prompt = prompt_turns(values, question)
        return [*system_turn(values), *prompt, *answer_turns(values, answer, prompt)]
    request = text_at(values, question, "the user's turn")
    return [*system_turn(values), *pair(request, text_at(values, answer, "the answer"))]


def classification_messages(values: Mapping[str, Any]) -> list[Message]:
    text, label = shape_of(values, DatasetFormat.CLASSIFICATION).required
    return pair(text_at(values, text, "the text"), text_at(values, label, "the name of the class"))


def summarization_messages(values: Mapping[str, Any]) -> list[Message]:
    return pair(SUMMARY_REQUEST + text_at(values, "text", "the text"), text_at(values, "summary", "the summary"))


def interaction_messages(values: Mapping[str, Any]) -> list[Message]:
    agent = object_at(values, "agent") if values.get("agent") is not None else {}
    role = text_at(agent, "role", "a role", within="agent.") if agent.get("role") is not None else ""
    system = SYSTEM_PROMPTS.get(role.strip().lower(), DEFAULT_SYSTEM_PROMPT)
    task = text_at(object_at(values, "task"), "description", "the task", within="task.")
    output = text_at(object_at(values, "execution"), "output", "the answer", within="execution.")
    return [Message(role="system", content=system), *pair(task, output)]


def turns_content(values: Mapping[str, Any], field: str) -> dict[str, Any]:
    messages = conversation(values, field)
    system = system_turn(values) if field == "conversations" else []
    if system and messages[0].role == "system":
        raise BadRow("system", f"a second system prompt beside the one in `{field}`", "one system prompt")
    tools = read_tools(values)
    check_calls(messages, tools, field)
    content: dict[str, Any] = {"messages": [*system, *messages]}
    return {**content, "tools": tools} if tools else content


def messages_alone(
    read: Callable[[Mapping[str, Any]], list[Message]],
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    return lambda values: {"messages": read(values)}


CONTENT_OF: dict[DatasetFormat, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    DatasetFormat.ALPACA: messages_alone(alpaca_messages),
    DatasetFormat.SHAREGPT: lambda values: turns_content(values, "conversations"),
    DatasetFormat.CHATML: lambda values: turns_content(values, "messages"),
    DatasetFormat.INTERACTIONS: messages_alone(interaction_messages),
    DatasetFormat.CHAT: messages_alone(chat_messages),
    DatasetFormat.CLASSIFICATION: messages_alone(classification_messages),
    DatasetFormat.SUMMARIZATION: messages_alone(summarization_messages),
    DatasetFormat.PREFERENCE: preference_content,
    DatasetFormat.KTO: kto_content,
}


def system_turn(values: Mapping[str, Any]) -> list[Message]:
    if values.get("system") is None or values["system"] == "":
        return []
    return [Message(role="system", content=text_at(values, "system", "the system prompt, or nothing"))]


def pair(request: str, answer: str) -> list[Message]:
    return [Message(role="user", content=request), Message(role="assistant", content=answer)]


def object_at(values: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = values.get(field)
    if not isinstance(value, dict):
        raise BadRow(field, found_at(values, field), f"an object with {OBJECT_FIELDS[field][0]}")
    return value


def ignored_fields(values: Mapping[str, Any], format: DatasetFormat) -> Iterator[str]:
    """Names of what a row holds beyond its format, such as `score`, `task.id` or `messages[].name`."""
    shape = shape_of(values, format)
    for name, value in values.items():
        if name not in (*shape.required, *shape.optional, *ROW_FIELDS):
            yield name
        elif format == DatasetFormat.INTERACTIONS and isinstance(value, dict):
            yield from (f"{name}.{key}" for key in value if key not in OBJECT_FIELDS.get(name, ()))
        elif name in ("messages", "conversations") and isinstance(value, list):
            turns = [turn for turn in value if isinstance(turn, dict)]
            keys = {key for turn in turns for key in turn if not (key == "name" and turn.get("role") == "tool")}
            yield from (f"{name}[].{key}" for key in sorted(keys) if key not in USED_TURN_FIELDS)
