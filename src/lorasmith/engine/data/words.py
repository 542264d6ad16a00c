"""Texts to token ids by way of their words, each of which the tokenizer is given once.

Before a byte-level tokenizer looks for tokens it cuts a text into words, by a pattern that is one of a few, and what it
makes of a word depends on that word alone. Python cuts in a seventh of the time that the tokenizer takes for cutting and
looking up, and finds the tokens of a known word in a dictionary. Only texts of characters that are listed here are cut: what
is a letter, a digit or a space among the others depends on the version of Unicode.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, filterfalse, pairwise
from typing import Any

import numpy as np

from lorasmith.errors import InvalidModel

MOST_CHARACTERS = 1 << 19  # of remembered words, which take up to 40 MB; then all are forgotten
# Of the words of a call. One alone costs the tokenizer three times what it costs in its text, so where more are not known
# (random letters, long numbers) only those that are there twice are asked for, and a text with another one is given whole.
MOST_FRESH = 0.2
# As they stand in tokenizer.json; the first is built into its ByteLevel
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# Each digit is cut off first, so white space before one is not followed by anything
SMOLLM_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}").replace(r"(?!\S)", r"(?![^\s\p{N}])")
# Latin, Greek, Cyrillic; without the long s, which is an s where case does not matter
LETTERS = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0180-\u024f\u0391-\u03a1\u03a3-\u03ce\u0400-\u0481"
DIGITS = "0-9"
# Beyond ASCII: punctuation, currencies, arrows, boxes, pictures. As the letters, they stay what they are in the form NFC.
SIGNS = (
    r"\u00a1-\u00a9\u00ab\u00ac\u00ae-\u00b1\u00b4\u00b6-\u00b8\u00bb\u00bf\u00d7\u00f7\u200d\u2010-\u2027\u2030-\u205e"
    r"\u20a0-\u20bf\u2190-\u21ff\u2500-\u2775\ufe0f\U0001f300-\U0001f64f\U0001f680-\U0001f6cf"
)
UNLISTED = re.compile(rf"[^\x00-\x7f{LETTERS}{SIGNS}]")
BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
FORMS = {"NFC", "NFD", "NFKC", "NFKD"}  # of Unicode, in all of which ASCII stays as it is

EncodeAll = Callable[[Sequence[str]], list[list[int]]]  # the tokenizer's own ids of each text


@dataclass(frozen=True)
class Cutting:
    """`pattern` cuts a text into words, one after the other, where nothing in it matches `other`."""

    pattern: re.Pattern[str]
    other: re.Pattern[str]

    def words(self, text: str) -> list[str] | None:
        """None for a text that only the tokenizer cuts."""
        return self.pattern.findall(text) if text.isascii() or not self.other.search(text) else None


class Words:
    """Remembers words. Not for two threads at once.

    `mark` is an added token, which ends words on both sides: with it between them, many words are one text.
    """

    def __init__(self, cutting: Cutting, mark: tuple[int, str], encode_all: EncodeAll) -> None:
        self.cutting, (self.mark_id, self.mark), self.encode_all = cutting, mark, encode_all
        self.known: dict[str, tuple[int, ...]] = {}
        self.characters = 0

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, in none of which there is an added token. One of each call is tokenised as well, and compared."""
        if self.characters > MOST_CHARACTERS:
            self.known.clear()
            self.characters = 0
        words = [self.cutting.words(text) for text in texts]
        cut = [found for found in words if found is not None]
        unknown = [*filterfalse(self.known.__contains__, chain.from_iterable(cut))]
        fresh = set(unknown)
        if len(fresh) > MOST_FRESH * sum(map(len, cut)):
            fresh = {word for word, count in Counter(unknown).items() if count > 1}
        self.learn([*fresh])
        ids = [None if found is None else self.joined(found) for found in words]
        compared = next((place for place, found in enumerate(ids) if found), None)
        rest = [place for place, found in enumerate(ids) if found is None or place == compared]
        whole = dict(zip(rest, self.encode_all([texts[place] for place in rest]), strict=True))
        if compared is not None and ids[compared] != whole[compared]:
            raise InvalidModel(
                "the tokenizer makes other tokens of a text than of its words one by one: "
                f"{texts[compared][:60]!r} is {whole[compared]} instead of {ids[compared]}",
                hint="this should not be; please report it with the model's tokenizer.json",
            )
        return [whole[place] if found is None else found for place, found in enumerate(ids)]

    def joined(self, words: list[str]) -> list[int] | None:
        """None where one of them is not known."""
        ids: list[int] = []
        try:
            for word in words:
                ids += self.known[word]  # two thirds of the time of a chain of iterators
        except KeyError:
            return None
        return ids

    def learn(self, fresh: list[str]) -> None:
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
        overlaps = any(content.startswith(content[place:]) for place in range(1, len(content)))  # `<<` after `<`
        if content.isascii() and content.isprintable() and " " not in content and content != unknown and not overlaps:
            return number, content
    return None


def for_python(pattern: str) -> str:
    r"""The pattern for `re` and its flag ASCII, with the listed characters in place of classes of Unicode.

    >>> for_python(r" ?\p{N}+| ?[^\s\p{N}]+")
    ' ?[0-9]+| ?[^\\s0-9]+'
    """
    for name, characters in ((r"\p{L}", LETTERS), (r"\p{N}", DIGITS)):
        bracketed = re.sub(rf"(\[[^\]]*\])|{re.escape(name)}", lambda found: found[1] or f"[{found[0]}]", pattern)
        pattern = bracketed.replace(name, characters)
    return pattern


def cutting_of(parts: dict[str, Any]) -> Cutting | None:
    """How the tokenizer of that tokenizer.json cuts; None where its pattern is not one of those that are known."""
    pattern = word_pattern([*flattened(parts["pre_tokenizer"])])
    forms = {part["type"] for part in flattened(parts["normalizer"])}
    if pattern is None or parts["model"]["type"] != "BPE" or not forms <= FORMS:
        return None
    return Cutting(re.compile(for_python(pattern), re.ASCII), UNLISTED if forms <= {"NFC"} else BEYOND_ASCII)


def word_pattern(pieces: list[dict[str, Any]]) -> str | None:
    match pieces:
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
