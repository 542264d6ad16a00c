"""Rows for preference training (DPO and its kin) and for KTO: kept as what they are, never read as plain answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorasmith.schemas.data import Message
from lorasmith.services.data_turns import (
    BadRow,
    check_calls,
    check_order,
    describe,
    found_at,
    read_tools,
    read_turns,
    role_key_of,
    text_at,
)

TRUTH = {"true": True, "false": False, "1": True, "0": False}
OPENAI_FIELDS = ("input", "preferred_output", "non_preferred_output")


def preference_content(values: Mapping[str, Any]) -> dict[str, Any]:
    """`messages` (the prompt), `chosen` and `rejected`. Forms: TRL's, with texts or turns, the prompt apart or at the
    front of both; LLaMA-Factory's with `instruction`; OpenAI's (platform.openai.com, direct preference optimization)."""
    names = ("chosen", "rejected")
    tools = None
    if "preferred_output" in values:
        source = values.get("input")
        if not isinstance(source, dict):
            raise BadRow("input", found_at(values, "input"), "an object with messages")
        prompt, names = prompt_turns(source, "messages", "input."), OPENAI_FIELDS[1:]
        tools = read_tools(source, "input.")
    elif "instruction" in values:
        instruction = text_at(values, "instruction", "the instruction")
        context = values.get("input")
        if context not in (None, ""):
            instruction += "\n\n" + text_at(values, "input", "the context of the instruction, or nothing")
        prompt = [Message(role="user", content=instruction)]
    else:
        prompt = prompt_turns(values, "prompt") if "prompt" in values else []
    chosen, rejected = (answer_turns(values, name, prompt) for name in names)
    if not prompt:
        prompt, chosen, rejected = common_front(chosen, rejected, names)
    if values.get("system") not in (None, ""):
        prompt = [Message(role="system", content=text_at(values, "system", "the system prompt, or nothing")), *prompt]
    if chosen == rejected:
        raise BadRow(names[1], "the same as the chosen answer", "a worse answer")
    check_calls([*prompt, *chosen], tools, names[0])
    content: dict[str, Any] = {"messages": prompt, "chosen": chosen, "rejected": rejected}
    return {**content, "tools": tools} if tools else content


def prompt_turns(values: Mapping[str, Any], field: str, within: str = "") -> list[Message]:
    """A text is the user's turn; a list of turns ends where the answer begins."""
    if not isinstance(values.get(field), list):
        return [Message(role="user", content=text_at(values, field, "the user's turn", within))]
    messages = read_turns(values, field)
    last = check_order(messages, within + field, role_key_of(values[field]))
    if last not in ("user", "tool"):
        raise BadRow(f"{within}{field}[{len(messages) - 1}]", f"{last} as the last turn", "a user turn")
    return messages


def answer_turns(values: Mapping[str, Any], field: str, prompt: list[Message]) -> list[Message]:
    """What follows the prompt: a text, or turns with or without the prompt in front of them."""
    if not isinstance(values.get(field), list):
        if not prompt:
            raise BadRow(field, found_at(values, field), "a list of turns, or a field `prompt` beside a text")
        return [Message(role="assistant", content=text_at(values, field, "the answer"))]
    messages = read_turns(values, field)
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    elif messages[0].role != "assistant":
        raise BadRow(f"{field}[0]", describe(messages[0].content), "the first turn of the prompt, or the answer")
    before = prompt[-1].role if prompt else "start"
    last = check_order(messages, field, role_key_of(values[field]), before)
    if last not in ("assistant", "call"):
        raise BadRow(f"{field}[{max(len(messages) - 1, 0)}]", f"{last} as the last turn", "an assistant turn")
    return messages


def common_front(
    chosen: list[Message], rejected: list[Message], names: tuple[str, ...]
) -> tuple[list[Message], list[Message], list[Message]]:
    """The turns that both begin with, up to the last user turn among them, and what is left of each."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1].role not in ("user", "tool"):
        shared -= 1
    if shared == 0:
        raise BadRow(names[1], "another first turn than the chosen answer has", "two answers to one prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def kto_content(values: Mapping[str, Any]) -> dict[str, Any]:
    """`messages` with the answer at their end, and whether it is `desirable` (field `label`)."""
    desirable = truth_of(values.get("label"))
    if desirable is None:
        raise BadRow("label", found_at(values, "label"), "true or false")
    prompt = prompt_turns(values, "prompt")
    return {"messages": [*prompt, *answer_turns(values, "completion", prompt)], "desirable": desirable}


def truth_of(value: Any) -> bool | None:
    """True or false, also as 1 and 0 and as words of a CSV file; None for all else."""
    if isinstance(value, str):
        return TRUTH.get(value.strip().lower())
    return bool(value) if isinstance(value, bool) or value in (0, 1) else None
