"""What is looked at in each row beyond its form: lengths, odd characters, language, secrets and personal data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from lorasmith.errors import InvalidSpec, MissingExtra
from lorasmith.schemas.data import DataPreparationSpec, DatasetFormat, Example, Finding
from lorasmith.services.data_secrets import find_personal_data, find_secrets
from lorasmith.services.data_text import find_control_character, find_mojibake

LANGUAGE_MIN_CHARS = 20  # below, a guess is noise
LANGUAGE_CHARS = 2000  # of a text are enough to tell
UNKNOWN = "unknown"


def texts_of(example: Example) -> Iterator[tuple[str, str]]:
    """(field, text) of all that a row says, the arguments of calls as JSON."""
    if example.text is not None:
        yield "text", example.text
    for name, messages in (("messages", example.messages), ("chosen", example.chosen), ("rejected", example.rejected)):
        for index, message in enumerate(messages or ()):
            yield f"{name}[{index}].content", message.content
            for number, call in enumerate(message.tool_calls or ()):
                arguments = json.dumps(call.function.arguments, ensure_ascii=False)
                yield f"{name}[{index}].tool_calls[{number}].function.arguments", arguments


def check_texts(example: Example) -> Iterator[Finding]:
    """At most one finding of a kind for each text."""
    for field, text in texts_of(example):
        if (found := find_control_character(text)) is not None:
            yield Finding(check="control-characters", field=field, found=found, expected="printable text")
        if (found := find_mojibake(text)) is not None:
            expected = "text that was decoded with its own encoding"
            yield Finding(check="mojibake", field=field, found=found, expected=expected)
        if (found := find_secrets(text)) is not None:
            yield Finding(check="secret", field=field, found=found, expected="no key, token or password")
        if (found := find_personal_data(text)) is not None:
            yield Finding(check="personal-data", field=field, found=found, expected="no personal data")


def check_lengths(values: Mapping[str, Any], spec: DataPreparationSpec) -> Iterator[Finding]:
    """Limits of the spec on fields of the row as it stands in the file; white space at the ends does not count."""
    for field, least in spec.min_chars.items():
        text = values.get(field)
        if isinstance(text, str) and len(text.strip()) < least:
            found, expected = f"{len(text.strip())} characters", f"at least {least}"
            yield Finding(check="too-short", field=field, found=found, expected=expected)
    for field, most in spec.max_chars.items():
        text = values.get(field)
        if isinstance(text, str) and len(text.strip()) > most:
            found, expected = f"{len(text.strip())} characters", f"at most {most}"
            yield Finding(check="too-long", field=field, found=found, expected=expected)


@cache
def language_identifier() -> Any:
    """Of py3langid; reading its model takes a second or two."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise MissingExtra("--language, which tells languages apart,", "data") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=False)


class LanguageCheck:
    """Which language a row's answer is in (its text, or its last assistant turn), by py3langid.

    Where the answer is the name of a class, the text that it is about is looked at.
    """

    def __init__(self, wanted: list[str]) -> None:
        self.identifier = language_identifier()
        known = sorted(self.identifier.labels)
        for code in wanted:
            if code not in known:
                raise InvalidSpec(
                    f"--language must be a code of ISO 639-1 that py3langid knows, got {code!r}", hint=", ".join(known)
                )
        self.wanted = wanted

    def language(self, example: Example, format: DatasetFormat) -> str:
        if format == DatasetFormat.CLASSIFICATION and example.messages:
            return self.language_of(example.messages[0].content)
        return self.language_of((example.chosen or [])[-1].content if example.chosen else example.answer())

    def language_of(self, text: str) -> str:
        letters = re.sub(r"[\W\d_]+", " ", text).strip()
        if len(letters) < LANGUAGE_MIN_CHARS:
            return UNKNOWN
        return str(self.identifier.classify(text[:LANGUAGE_CHARS])[0])

    def check(self, language: str, format: DatasetFormat) -> Iterator[Finding]:
        if language != UNKNOWN and language not in self.wanted:
            field = "text" if format == DatasetFormat.CLASSIFICATION else "answer"
            yield Finding(check="other-language", field=field, found=language, expected=" or ".join(self.wanted))


class ContextCheck:
    """How many tokens a row's contents have, against a model's context. The template's own tokens come on top, so a
    row that is over it here is over it in training as well."""

    def __init__(self, count: Callable[[list[str]], int], context: int) -> None:
        self.count = count
        self.context = context

    def tokens(self, example: Example) -> int:
        return self.count([text for _, text in texts_of(example) if text])

    def check(self, tokens: int) -> Iterator[Finding]:
        if tokens > self.context:
            found, expected = f"{tokens} tokens without the template", f"at most {self.context}, the model's context"
            yield Finding(check="over-context", field="row", found=found, expected=expected)


def open_tokenizer(folder: Any, context: int) -> ContextCheck:
    """Of a model folder with tokenizer.json; `context` in tokens."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingExtra("--tokenizer", "data") from None
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InvalidSpec(f"{folder} holds no tokenizer.json, which --tokenizer needs", hint="choose another model")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()

    def count(texts: list[str]) -> int:
        return sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts, add_special_tokens=False))

    return ContextCheck(count, context)
