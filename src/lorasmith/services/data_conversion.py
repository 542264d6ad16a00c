"""One raw row to one canonical example, or the reason why not."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, cast

from lorasmith.errors import InvalidData, did_you_mean
from lorasmith.schemas.data import PARTS, DatasetFormat, Example, Message, Part, Role
from lorasmith.services.data_formats import ROW_FIELDS, shape_of
from lorasmith.services.data_reading import RawRow

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

MESSAGE_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SHAREGPT_ROLES: dict[str, Role] = {**MESSAGE_ROLES, "human": "user", "gpt": "assistant"}
MAY_BE_EMPTY = ("system", "tool")
OBJECT_FIELDS = {"task": ("description",), "agent": ("role",), "execution": ("output",)}


class BadRow(InvalidData):
    """A row that cannot be trained on: `field`, what was found in it, what was expected."""

    def __init__(self, field: str, found: str, expected: str) -> None:
        super().__init__(f"field `{field}`: found {found}, expected {expected}")
        self.field = field


def convert(row: RawRow, format: DatasetFormat) -> Example:
    """The canonical example of a row. Texts are kept as they stand; raises `BadRow` when something is missing."""
    values = row.values
    if format == DatasetFormat.COMPLETION:
        text = text_at(values, "text", "the text to train on")
        return Example(id=content_id(text), group=group_of(values, text), row=row.number, text=text)
    messages = MESSAGES_OF[format](values)
    first_user_turn = next(message.content for message in messages if message.role == "user")
    identity = [message.model_dump() for message in messages]
    return Example(id=content_id(identity), group=group_of(values, first_user_turn), row=row.number, messages=messages)


def content_id(content: str | list[dict[str, str]]) -> str:
    """First 16 hex digits of the sha256 of the messages or the text as canonical JSON."""
    canonical = json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def normalised(text: str) -> str:
    """NFC, with each run of white space as one blank: what makes two rows exact duplicates."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def group_of(values: Mapping[str, Any], beginning: str) -> str:
    """The row's own `group`, else the digest of its first user turn: rows that ask the same stay together."""
    group = values.get("group")
    if isinstance(group, int) and not isinstance(group, bool):
        group = str(group)
    if group is None or group == "":
        return hashlib.sha256(normalised(beginning).lower().encode()).hexdigest()[:16]
    return text_at({"group": group}, "group", "a name")


def explicit_part(values: Mapping[str, Any]) -> Part | None:
    """The part that the row itself asks for."""
    part = values.get("split")
    if part is None or part == "":
        return None
    if part not in PARTS:
        raise BadRow("split", describe(part), "train, val or test")
    return cast(Part, part)


def alpaca_messages(values: Mapping[str, Any]) -> list[Message]:
    instruction = text_at(values, "instruction", "the instruction")
    context = values.get("input")
    if context is not None and (not isinstance(context, str) or context.strip()):
        instruction += "\n\n" + text_at(values, "input", "the context of the instruction, or nothing")
    return [*system_turn(values), *pair(instruction, text_at(values, "output", "the answer"))]


def chat_messages(values: Mapping[str, Any]) -> list[Message]:
    question, answer = shape_of(values, DatasetFormat.CHAT).required
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


def chatml_messages(values: Mapping[str, Any]) -> list[Message]:
    return conversation(values, "messages", "role", "content", MESSAGE_ROLES)


def sharegpt_messages(values: Mapping[str, Any]) -> list[Message]:
    turns = conversation(values, "conversations", "from", "value", SHAREGPT_ROLES)
    system = system_turn(values)
    if system and turns[0].role == "system":
        raise BadRow("system", "a second system prompt beside the one in `conversations`", "one system prompt")
    return [*system, *turns]


MESSAGES_OF = {
    DatasetFormat.ALPACA: alpaca_messages,
    DatasetFormat.SHAREGPT: sharegpt_messages,
    DatasetFormat.CHATML: chatml_messages,
    DatasetFormat.INTERACTIONS: interaction_messages,
    DatasetFormat.CHAT: chat_messages,
    DatasetFormat.CLASSIFICATION: classification_messages,
    DatasetFormat.SUMMARIZATION: summarization_messages,
}


def system_turn(values: Mapping[str, Any]) -> list[Message]:
    if values.get("system") is None or values["system"] == "":
        return []
    return [Message(role="system", content=text_at(values, "system", "the system prompt, or nothing"))]


def pair(request: str, answer: str) -> list[Message]:
    return [Message(role="user", content=request), Message(role="assistant", content=answer)]


def conversation(
    values: Mapping[str, Any], field: str, role_key: str, text_key: str, roles: Mapping[str, Role]
) -> list[Message]:
    """Turns in an order that every chat template renders: system?, then user and assistant by turns, assistant last."""
    turns = values.get(field)
    if not isinstance(turns, list) or not turns:
        raise BadRow(field, found_at(values, field), "a list of turns")
    messages = [read_turn(turn, f"{field}[{index}]", role_key, text_key, roles) for index, turn in enumerate(turns)]
    if not any(message.role == "assistant" for message in messages):
        raise BadRow(field, f"no assistant turn among {len(messages)}", "an answer as the last turn")
    before = "start"
    for index, message in enumerate(messages):
        if before not in MAY_FOLLOW[message.role]:
            found = f"{message.role} as the first turn" if before == "start" else f"{message.role} after {before}"
            raise BadRow(f"{field}[{index}].{role_key}", found, EXPECTED_AFTER[before])
        before = message.role
    if before != "assistant":
        raise BadRow(f"{field}[{len(messages) - 1}]", f"{before} as the last turn", "an assistant turn")
    return messages


MAY_FOLLOW: dict[Role, tuple[str, ...]] = {
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
EXPECTED_AFTER = {
    "start": "system or user",
    "system": "user",
    "user": "assistant; join turns of one side",
    "assistant": "user; join turns of one side",
    "tool": "assistant",
}


def read_turn(turn: Any, field: str, role_key: str, text_key: str, roles: Mapping[str, Role]) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(field, describe(turn), f"an object with {role_key} and {text_key}")
    name = turn.get(role_key)
    if not isinstance(name, str) or name not in roles:
        near = did_you_mean(name, roles) if isinstance(name, str) else ""
        raise BadRow(f"{field}.{role_key}", found_at(turn, role_key) + near, f"one of {', '.join(roles)}")
    for calls in ("tool_calls", "function_call"):
        if turn.get(calls):
            raise BadRow(f"{field}.{calls}", describe(turn[calls]), "none: a call of a tool cannot be trained yet")
    role = roles[name]
    if role in MAY_BE_EMPTY and turn.get(text_key) == "":
        return Message(role=role, content="")
    if isinstance(turn.get(text_key), list):
        raise BadRow(f"{field}.{text_key}", "a list of parts", "one text; images and other parts cannot be trained")
    what = "the answer" if role == "assistant" else "the turn's text"
    return Message(role=role, content=text_at(turn, text_key, what, within=f"{field}."))


def object_at(values: Mapping[str, Any], field: str) -> dict[str, Any]:
    value = values.get(field)
    if not isinstance(value, dict):
        raise BadRow(field, found_at(values, field), f"an object with {OBJECT_FIELDS[field][0]}")
    return value


def text_at(values: Mapping[str, Any], field: str, what: str, within: str = "") -> str:
    """A text with something in it; `what` it is and `within` which field go into the error."""
    value = values.get(field)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(within + field, found_at(values, field), f"{what} as text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"half of a surrogate pair at character {error.start + 1}"
        raise BadRow(within + field, found, "valid Unicode text") from None
    return value


def found_at(values: Mapping[str, Any], field: str) -> str:
    return describe(values[field]) if field in values else "nothing"


def describe(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str() if not value.strip():
            return "only white space" if value else "an empty text"
        case str():
            return repr(value if len(value) <= 40 else value[:40] + "…")
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with {', '.join(list(value)[:5]) or 'nothing in it'}"
        case _:
            return f"the number {value}"


def ignored_fields(values: Mapping[str, Any], format: DatasetFormat) -> Iterator[str]:
    """Names of what a row holds beyond its format, such as `score`, `task.id` or `messages[].name`."""
    shape = shape_of(values, format)
    for name, value in values.items():
        if name not in (*shape.required, *shape.optional, *ROW_FIELDS):
            yield name
        elif format == DatasetFormat.INTERACTIONS and isinstance(value, dict):
            yield from (f"{name}.{key}" for key in value if key not in OBJECT_FIELDS.get(name, ()))
        elif name in ("messages", "conversations") and isinstance(value, list):
            known = ("role", "content") if name == "messages" else ("from", "value")
            keys = {key for turn in value if isinstance(turn, dict) for key in turn}
            yield from (f"{name}[].{key}" for key in sorted(keys) if key not in known)
