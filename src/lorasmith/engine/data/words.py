"""Texts to token ids by way of their words, each of which the tokenizer is given once.

Before a byte-level tokenizer looks for tokens it cuts a text into words, by a pattern that is one of a few, and what it
makes of a word depends on that word alone. Python cuts in a seventh of the time that the tokenizer takes for cutting and
looking up, and finds the tokens of a known word in a dictionary. Only ASCII is cut here: what a letter, a digit or a
space is beyond it depends on the version of Unicode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np

MOST_CHARACTERS = 1 << 20  # of remembered words, some 40 MB; then all are forgotten
# As they stand in tokenizer.json
# what ByteLevel has built in
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# Each digit is cut off first, so white space before one is not followed by anything
SMOLLM_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
FORMS = {"NFC", "NFD", "NFKC", "NFKD"}  # of Unicode, in all of which ASCII stays as it is

EncodeAll = Callable[[Sequence[str]], list[list[int]]]  # the tokenizer's own ids of each text


class Words:
    """Remembers the words of ASCII texts. Not for two threads at once.

    `mark` is an added token, which ends words on both sides: with it between them, many words are one text.
    """

    def __init__(self, pattern: str, mark: tuple[int, str], encode_all: EncodeAll) -> None:
        self.pattern = re.compile(in_ascii(pattern), re.ASCII)
        (self.mark_id, self.mark), self.encode_all = mark, encode_all
        self.known: dict[str, tuple[int, ...]] = {}
        self.characters = 0

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in none of which there is an added token."""
        words = [self.pattern.findall(text) if text.isascii() else None for text in texts]
        self.learn(set().union(*filter(None, words)))
        others = iter(self.encode_all([text for text, found in zip(texts, words, strict=True) if found is None]))
        ids_of = self.known.__getitem__
        return [next(others) if found is None else list(chain.from_iterable(map(ids_of, found))) for found in words]

    def learn(self, words: set[str]) -> None:
        if self.characters > MOST_CHARACTERS:
            self.known.clear()
            self.characters = 0
        fresh = list(words - self.known.keys())
        if not fresh:
            return
        self.characters += sum(map(len, fresh))
        ids = self.encode_all([self.mark.join(fresh)])[0]  # one call for each takes three times as long
        marks = np.flatnonzero(np.array(ids) == self.mark_id).tolist()
        if len(marks) != len(fresh) - 1:  # a word and the mark after it begin another added token; none is known to
            self.known.update(zip(fresh, map(tuple, self.encode_all(fresh)), strict=True))
            return
        for word, (before, end) in zip(fresh, pairwise([-1, *marks, len(ids)]), strict=True):
            self.known[word] = tuple(ids[before + 1 : end])


def mark_of(added: Mapping[int, str], unknown: str | None) -> tuple[int, str] | None:
    """Of added tokens one whose id no text without it has: in printable ASCII the vocabulary spells a text as it is."""
    for number, content in added.items():
        if content.isascii() and content.isprintable() and " " not in content and content != unknown:
            return number, content
    return None


def in_ascii(pattern: str) -> str:
    r"""The pattern for `re`, which has no classes of Unicode, and for texts in ASCII.

    >>> in_ascii(r" ?\p{L}+| ?[^\s\p{L}\p{N}]+")
    ' ?[A-Za-z]+| ?[^\\sA-Za-z0-9]+'
    """
    for name, characters in ((r"\p{L}", "A-Za-z"), (r"\p{N}", "0-9")):
        inside = re.compile(r"(\[[^\]]*)" + re.escape(name))
        while inside.search(pattern):
            pattern = inside.sub(lambda found: found[1] + characters, pattern)  # noqa: B023  used at once
        pattern = pattern.replace(name, f"[{characters}]")
    return pattern


def word_pattern(parts: dict[str, Any]) -> str | None:
    """What cuts texts into words, of the parts of a tokenizer.json; None where that is not one of the known patterns."""
    if parts["model"]["type"] != "BPE" or any(part["type"] not in FORMS for part in flattened(parts["normalizer"])):
        return None
    match [*flattened(parts["pre_tokenizer"])]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_PATTERN
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return SMOLLM_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if pattern in (GPT2_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN):
            return pattern
    return None


def flattened(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The parts of a sequence, or the one part, or none."""
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part.get("normalizers") or part.get("pretokenizers") or []:
            yield from flattened(inner)
    else:
        yield part
