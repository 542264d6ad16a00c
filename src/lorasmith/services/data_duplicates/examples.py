"""Stored examples as the texts that are compared: without system prompts and tools, which rows share anyway."""

from __future__ import annotations

import json

from lorasmith.schemas.data import Example, Message
from lorasmith.services.data_duplicates.texts import Row


def row_of(example: Example) -> Row:
    """The turns before the last answer as instruction, that answer as answer; a preference has two answers."""
    if example.messages is None:
        return Row(example.row, example.text or "")
    if example.chosen is not None and example.rejected is not None:
        return Row(example.row, text_of(example.messages), text_of([*example.chosen, *example.rejected]))
    before = example.prompt_messages()
    return Row(example.row, text_of(before), text_of(example.messages[len(before) :]))


def whole_text(example: Example) -> str:
    row = row_of(example)
    return f"{row.instruction}\n{row.answer}" if row.answer else row.instruction


def text_of(messages: list[Message]) -> str:
    return "\n".join(text for message in messages if message.role != "system" for text in texts_of(message))


def texts_of(message: Message) -> list[str]:
    """Content and calls of one turn, those that there are."""
    calls = [
        f"{call.function.name} {json.dumps(call.function.arguments, ensure_ascii=False, sort_keys=True)}"
        for call in message.tool_calls or ()
    ]
    return [text for text in (message.content, *calls) if text]
