"""What `--mend` changes in a row before it is converted, and how that is said in the ledger."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from lorasmith.schemas.data import Mend
from lorasmith.services.data_text import without_control_characters, without_mojibake
from lorasmith.services.data_turns import MESSAGE_ROLES, SHAREGPT_ROLES, TURN_KEYS

TEXT_MENDS: dict[Mend, tuple[Callable[[str], str], str]] = {
    "mojibake": (without_mojibake, "decoded again"),  # first: its continuation bytes look like control characters
    "control-characters": (without_control_characters, "control characters removed"),
}
ALL_ROLES = {**MESSAGE_ROLES, **SHAREGPT_ROLES}


def mended(values: dict[str, Any], mends: Collection[Mend]) -> tuple[dict[str, Any], list[str]]:
    """The row with its texts mended, and one sentence for each change: `messages[1].content: decoded again`."""
    changes: list[str] = []
    for mend, (change, sentence) in TEXT_MENDS.items():
        if mend in mends:
            values = change_texts(values, change, sentence, "", changes)
    if "join-turns" in mends:
        for field in ("messages", "conversations"):
            if isinstance(values.get(field), list):
                values = {**values, field: join_turns(values[field], field, changes)}
    return values, changes


def change_texts(value: Any, change: Callable[[str], str], sentence: str, field: str, changes: list[str]) -> Any:
    if isinstance(value, str):
        result = change(value)
        if result != value:
            changes.append(f"{field}: {sentence}")
        return result
    if isinstance(value, dict):
        within = f"{field}." if field else ""
        return {key: change_texts(one, change, sentence, f"{within}{key}", changes) for key, one in value.items()}
    if isinstance(value, list):
        return [change_texts(one, change, sentence, f"{field}[{index}]", changes) for index, one in enumerate(value)]
    return value


def join_turns(turns: list[Any], field: str, changes: list[str]) -> list[Any]:
    """Turns of the same side that follow each other become one, with an empty line between their texts."""
    joined: list[Any] = []
    for index, turn in enumerate(turns):
        texts = text_of(joined[-1]) if joined else None, text_of(turn)
        if texts[0] is not None and texts[1] is not None and texts[0][:2] == texts[1][:2]:
            _, key, before = texts[0]
            joined[-1] = {**joined[-1], key: f"{before}\n\n{texts[1][2]}"}
            changes.append(f"{field}[{index}]: joined to the turn before")
        else:
            joined.append(turn)
    return joined


def text_of(turn: Any) -> tuple[str, str, str] | None:
    """(role, name of the text field, text) of a user or assistant turn that is nothing but text."""
    if not isinstance(turn, dict):
        return None
    for role_key, text_key in TURN_KEYS:
        if set(turn) == {role_key, text_key} and isinstance(turn[role_key], str) and isinstance(turn[text_key], str):
            role = ALL_ROLES.get(turn[role_key])
            if role in ("user", "assistant") and turn[role_key] != "function_call":
                return role, text_key, turn[text_key]
    return None
