"""A teacher's answer as the texts that were asked for, or what is wrong with it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from lorasmith.schemas.augmentation import LANGUAGE_CODE, RowReason
from lorasmith.schemas.teachers import Answered

FENCE = re.compile(r"```[A-Za-z]*[ \t]*\n(?P<code>.*?)\n?```", re.DOTALL)
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)  # models that reason may begin with it
SHOWN_CHARS = 60


class BadAnswer(Exception):
    """What was found and what was expected."""

    def __init__(self, reason: RowReason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason
        self.sentence = sentence


@dataclass(frozen=True)
class Texts:
    """At least one text, none of them empty; `language` where it was asked for."""

    texts: list[str]
    language: str | None = None


def read_texts(answer: Answered, n: int, *, with_language: bool = False) -> Texts:
    """The first `n` texts of `{"texts": [...]}`, which may stand in a code fence. Raises `BadAnswer`."""
    if answer.finish_reason == "length":
        raise BadAnswer("cut", "the answer was cut at max_tokens; a greater --max-tokens lets it end")
    if answer.finish_reason == "content_filter":
        raise BadAnswer("filtered", "the endpoint's content filter took the answer away")
    body = THOUGHT.sub("", answer.text, count=1).strip()
    fence = FENCE.fullmatch(body)
    body = fence["code"].strip() if fence else body
    if not body:
        raise BadAnswer("empty", "the answer is empty")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise BadAnswer("not-json", f"expected a JSON object, got {short(body)}") from None
    texts = value.get("texts") if isinstance(value, dict) else None
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadAnswer("wrong-shape", f'expected {{"texts": [strings]}}, got {short(body)}')
    texts = [text.strip() for text in texts[:n] if text.strip()]
    if not texts:
        raise BadAnswer("empty", "the list of texts holds none")
    if not with_language:
        return Texts(texts)
    language = value.get("language")
    if not isinstance(language, str) or not re.fullmatch(LANGUAGE_CODE, language.strip().lower()):
        raise BadAnswer("wrong-shape", f'expected "language" with an ISO 639-1 code, got {short(str(language))}')
    return Texts(texts, language.strip().lower())


def short(text: str) -> str:
    return ascii(text[:SHOWN_CHARS]) + ("…" if len(text) > SHOWN_CHARS else "")
