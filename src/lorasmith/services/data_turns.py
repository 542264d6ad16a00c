"""Turns of a conversation as a file holds them, to messages: roles, order, weights, and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from lorasmith.errors import InvalidData, did_you_mean
from lorasmith.schemas.data import Finding, Message, Role, ToolCall, ToolFunction

MESSAGE_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",
    "function": "tool",
}
SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
TURN_KEYS = (("role", "content"), ("from", "value"))
USED_TURN_FIELDS = ("role", "content", "from", "value", "weight", "tool_calls", "function_call", "tool_call_id")
MAY_BE_EMPTY = ("system", "tool")
MAY_FOLLOW: dict[Role, tuple[str, ...]] = {
    "system": ("start",),
    "user": ("start", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "call", "tool"),
}
EXPECTED_AFTER = {
    "start": "system or user",
    "system": "user",
    "user": "assistant; join turns of one side",
    "assistant": "user; join turns of one side",
    "call": "tool: the result of the call",
    "tool": "assistant",
}


class BadRow(InvalidData):
    """A row that cannot be trained on: `field`, what was found in it, what was expected.

    `findings` are all those of a row that was refused for one of them, else the one that makes it unusable.
    """

    def __init__(self, field: str, found: str, expected: str, findings: Sequence[Finding] = ()) -> None:
        super().__init__(f"field `{field}`: found {found}, expected {expected}")
        self.field = field
        self.findings = list(findings) or [Finding(check="unusable", field=field, found=found, expected=expected)]


def conversation(values: Mapping[str, Any], field: str) -> list[Message]:
    """Turns in an order that every chat template renders: system?, then user and assistant by turns, assistant last."""
    messages = read_turns(values, field)
    if not any(message.role == "assistant" for message in messages):
        raise BadRow(field, f"no assistant turn among {len(messages)}", "an answer as the last turn")
    last = check_order(messages, field, role_key_of(values[field]))
    if last not in ("assistant", "call"):
        raise BadRow(f"{field}[{len(messages) - 1}]", f"{last} as the last turn", "an assistant turn")
    if not any(message.is_trained for message in messages):
        raise BadRow(field, "weight 0 on each assistant turn", "an answer to train")
    return messages


def read_turns(values: Mapping[str, Any], field: str) -> list[Message]:
    turns = values.get(field)
    if not isinstance(turns, list) or not turns:
        raise BadRow(field, found_at(values, field), "a list of turns")
    return [read_turn(turn, f"{field}[{index}]", field) for index, turn in enumerate(turns)]


def role_key_of(turns: Sequence[Any]) -> str:
    return "from" if isinstance(turns[0], dict) and "from" in turns[0] else "role"


def check_order(messages: Sequence[Message], field: str, role_key: str, before: str = "start") -> str:
    """The role of the last turn, `call` where it calls a tool. `before` is what stands in front of the turns."""
    for index, message in enumerate(messages):
        if before not in MAY_FOLLOW[message.role]:
            found = f"{message.role} as the first turn" if before == "start" else f"{message.role} after {before}"
            raise BadRow(f"{field}[{index}].{role_key}", found, EXPECTED_AFTER[before])
        before = "call" if message.tool_calls else message.role
    return before


def read_turn(turn: Any, field: str, list_field: str) -> Message:
    sharegpt = isinstance(turn, dict) and ("from" in turn or (list_field == "conversations" and "role" not in turn))
    role_key, text_key = TURN_KEYS[sharegpt]
    if not isinstance(turn, dict):
        role_key, text_key = TURN_KEYS[list_field == "conversations"]
        raise BadRow(field, describe(turn), f"an object with {role_key} and {text_key}")
    roles = SHAREGPT_ROLES if sharegpt else MESSAGE_ROLES
    name = turn.get(role_key)
    if not isinstance(name, str) or name not in roles:
        near = did_you_mean(name, roles) if isinstance(name, str) else ""
        raise BadRow(f"{field}.{role_key}", found_at(turn, role_key) + near, f"one of {', '.join(roles)}")
    if name == "function_call":
        return Message(role="assistant", content="", tool_calls=calls_in_text(turn, f"{field}.{text_key}", text_key))
    return Message(role=roles[name], **turn_fields(turn, field, roles[name], text_key))


def turn_fields(turn: Mapping[str, Any], field: str, role: Role, text_key: str) -> dict[str, Any]:
    calls = read_calls(turn, field, role)
    fields: dict[str, Any] = {"content": turn_text(turn, field, role, text_key, calls)}
    if calls:
        fields["tool_calls"] = calls
    if role == "tool":
        for key in ("tool_call_id", "name"):
            if turn.get(key) is not None:
                fields[key] = text_at(turn, key, "a name", within=f"{field}.")
    if (weight := turn.get("weight")) is not None:
        if role != "assistant" or isinstance(weight, bool) or weight not in (0, 1):
            raise BadRow(f"{field}.weight", describe(weight), "0 or 1, on an assistant turn")
        if weight == 0:
            fields["weight"] = 0
    return fields


def turn_text(turn: Mapping[str, Any], field: str, role: Role, text_key: str, calls: list[ToolCall]) -> str:
    text = turn.get(text_key)
    if (role in MAY_BE_EMPTY and text == "") or (calls and (text is None or text == "")):
        return ""
    if isinstance(text, list):
        raise BadRow(f"{field}.{text_key}", "a list of parts", "one text; images and other parts cannot be trained")
    return text_at(turn, text_key, "the answer" if role == "assistant" else "the turn's text", within=f"{field}.")


def read_calls(turn: Mapping[str, Any], field: str, role: Role) -> list[ToolCall]:
    calls = turn.get("tool_calls")
    if turn.get("function_call"):  # OpenAI's form before 2023-11
        return [read_call({"function": turn["function_call"]}, f"{field}.function_call", role)]
    if not calls:
        return []
    if not isinstance(calls, list):
        raise BadRow(f"{field}.tool_calls", describe(calls), "a list of calls")
    return [read_call(call, f"{field}.tool_calls[{index}]", role) for index, call in enumerate(calls)]


def read_call(call: Any, field: str, role: Role) -> ToolCall:
    """`{"id", "type": "function", "function": {"name", "arguments"}}`; the arguments as JSON in a text or as an object."""
    if role != "assistant":
        raise BadRow(field, f"a call of a tool in a {role} turn", "calls in assistant turns alone")
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise BadRow(field, describe(call), "an object with function: {name, arguments}")
    name = text_at(function, "name", "the name of the function", within=f"{field}.function.")
    arguments = object_of_json(function.get("arguments", {}), f"{field}.function.arguments")
    try:
        return ToolCall(id=call.get("id"), function=ToolFunction(name=name, arguments=arguments))
    except ValidationError:
        raise BadRow(f"{field}.id", describe(call.get("id")), "a text") from None


def calls_in_text(turn: Mapping[str, Any], field: str, text_key: str) -> list[ToolCall]:
    """Of a ShareGPT turn `function_call`: `{"name", "arguments"}` or a list of them, as JSON."""
    text = turn.get(text_key)
    value = parsed(text, field) if isinstance(text, str) else text
    functions = value if isinstance(value, list) else [value]
    if not functions:
        raise BadRow(field, "a list of 0", "a call of a tool")
    return [read_call({"function": function}, field, "assistant") for function in functions]


def read_tools(values: Mapping[str, Any], within: str = "") -> list[dict[str, Any]] | None:
    """The tools that a row offers, each `{"type": "function", "function": {"name", …}}`; also as JSON in a text."""
    tools = values.get("tools")
    if tools is None or tools in ("", []):
        return None
    field = f"{within}tools"
    value = parsed(tools, field) if isinstance(tools, str) else tools
    if value == []:
        return None
    if not isinstance(value, list):
        raise BadRow(field, describe(value), "a list of tools")
    return [read_tool(tool, f"{field}[{index}]") for index, tool in enumerate(value)]


def read_tool(tool: Any, field: str) -> dict[str, Any]:
    whole = tool if isinstance(tool, dict) and isinstance(tool.get("function"), dict) else {"function": tool}
    function = whole["function"]
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(field, describe(tool), "an object with function: {name, description, parameters}")
    checked_json(tool, field)
    return {"type": "function", **whole}


def check_calls(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, field: str) -> None:
    """Each call names a tool that the row offers, with its required arguments; each result answers a call."""
    offered = {tool["function"]["name"]: tool["function"] for tool in tools or ()}
    ids: set[str] = set()
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if message.tool_call_id is not None and ids and message.tool_call_id not in ids:
            raise BadRow(
                f"{where}.tool_call_id", repr(message.tool_call_id), f"one of {', '.join(map(repr, sorted(ids)))}"
            )
        for number, call in enumerate(message.tool_calls or ()):
            if call.id is not None:
                ids.add(call.id)
            if offered:
                check_call(call, offered, f"{where}.tool_calls[{number}].function")


def check_call(call: ToolCall, offered: Mapping[str, dict[str, Any]], field: str) -> None:
    name, arguments = call.function.name, call.function.arguments
    if name not in offered:
        near = did_you_mean(name, offered)
        raise BadRow(f"{field}.name", repr(name) + near, f"one of the row's tools: {', '.join(offered)}")
    parameters = offered[name].get("parameters")
    required = parameters.get("required") if isinstance(parameters, dict) else None
    missing = [one for one in required if one not in arguments] if isinstance(required, list) else []
    if missing:
        raise BadRow(f"{field}.arguments", f"no {missing[0]!r}", f"the arguments that {name} requires")


def object_of_json(value: Any, field: str) -> dict[str, Any]:
    found = parsed(value, field) if isinstance(value, str) else value
    if not isinstance(found, dict):
        raise BadRow(field, describe(found), "an object of arguments")
    checked_json(found, field)
    return found


def parsed(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow(field, f"broken JSON ({error}) in {describe(text)}", "valid JSON") from None


def checked_json(value: Any, field: str) -> None:
    """Raise where the value cannot be written as JSON again: NaN, half of a surrogate pair, what a table held."""
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise BadRow(field, f"{describe(value)} ({error})", "valid JSON") from None


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
            keys = ", ".join(str(key)[:40] for key in list(value)[:5]).encode(errors="backslashreplace").decode()
            return f"an object with {keys or 'nothing in it'}"
        case int() if value.bit_length() > 1000:
            return "a number of more than 300 digits"
        case int() | float():
            return f"the number {value}"
        case _:
            return f"a {type(value).__name__}"
