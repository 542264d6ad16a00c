"""Texts to sets of shingles: runs of `size` tokens, each hashed to 64 bits, for many texts at once.

A token is a run of letters, digits and marks, or one other character; in scripts that write no spaces each character
is a token. With the unit `character` every character is one. Each text is padded with `size - 1` marks on both sides,
as in nltk's `pad_left` and `pad_right`, so that a text of one token has shingles too: k tokens make k + size - 1.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lorasmith.errors import InvalidSpec

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Unit = Literal["word", "character"]

SPACE, LETTER, SINGLE, SYMBOL, UNKNOWN = range(5)
WITHOUT_SPACES = (  # first and last code point of scripts that write words without spaces between them
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
BASE = 0x9E3779B97F4A7C15  # odd, so that its powers have inverses modulo 2^64
STEP = np.uint64(0xD6E8FEB86659FD93)
PADDING = np.uint64(0xA0761D6478BD642F)


@dataclass(frozen=True)
class Shingling:
    """What one shingle is: `size` tokens of a unit."""

    unit: Unit = "word"
    size: int = 3

    def __post_init__(self) -> None:
        if self.unit not in ("word", "character"):
            raise InvalidSpec(f"the unit of a shingle is word or character, got {self.unit!r}")
        if not 1 <= self.size <= 32:
            raise InvalidSpec(f"a shingle has between 1 and 32 tokens, got {self.size}")


@dataclass(frozen=True)
class Ragged:
    """Values of many texts laid end to end; those of text i stand at `offsets[i]` to `offsets[i + 1]`."""

    values: U64
    offsets: I64

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> U64:
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def lengths(self) -> I64:
        return np.diff(self.offsets)

    def take(self, rows: NDArray[np.integer]) -> Ragged:
        """The texts of `rows`, in that order."""
        return self.cut(self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows])

    def first(self, counts: I64) -> Ragged:
        """The first `counts[i]` values of each text."""
        return self.cut(self.offsets[:-1], counts)

    def cut(self, starts: I64, lengths: I64) -> Ragged:
        offsets = offsets_of(lengths)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Ragged(self.values[np.repeat(starts, lengths) + within], offsets)


@dataclass(frozen=True)
class Tokens:
    """Hashes of the tokens of many texts, and where each token stands in its text (characters, end exclusive)."""

    hashes: Ragged
    starts: I64
    ends: I64


def offsets_of(lengths: NDArray[np.integer] | NDArray[np.bool_]) -> I64:
    """Where each of several lengths begins, and the end of the last: (n + 1,)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def mix(values: U64) -> U64:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that spreads every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def class_of(point: int) -> int:
    if chr(point).isspace():
        return SPACE
    if any(first <= point <= last for first, last in WITHOUT_SPACES):
        return SINGLE
    return LETTER if unicodedata.category(chr(point))[0] in "LNM" else SYMBOL


ASCII_CLASSES = bytes(map(class_of, range(128))) + bytes(128)


@cache
def class_table() -> NDArray[np.uint8]:
    """The class of each code point, filled as they are met: all 1.1 million take half a second."""
    return np.full(0x110000, UNKNOWN, np.uint8)


def points_and_classes(text: str) -> tuple[NDArray[np.uint8] | NDArray[np.uint32], NDArray[np.uint8]]:
    """Code points of a text and the class of each. ASCII takes a quarter of the time."""
    if text.isascii():
        content = text.encode("ascii")
        return np.frombuffer(content, np.uint8), np.frombuffer(content.translate(ASCII_CLASSES), np.uint8)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    table = class_table()
    classes = table[points]
    unknown = points[classes == UNKNOWN]
    if len(unknown):
        for point in np.unique(unknown).tolist():
            table[point] = class_of(point)
        classes = table[points]
    return points, classes


@lru_cache(maxsize=1)
def powers(count: int) -> tuple[U64, U64]:
    """BASE^i and BASE^-i modulo 2^64 for i below `count`."""
    forward = np.full(count, BASE, np.uint64)
    backward = np.full(count, pow(BASE, -1, 2**64), np.uint64)
    forward[:1] = backward[:1] = 1
    return np.multiply.accumulate(forward), np.multiply.accumulate(backward)


def tokens_of(texts: Sequence[str], unit: Unit, *, symbols: bool = True) -> Tokens:
    """Tokens of folded texts. A token's hash is the polynomial of its code points, plus one, in BASE, mixed.

    Without `symbols`, words alone are tokens: punctuation and signs only end them.
    """
    joined = "\n".join(texts) + "\n"  # a line break ends the last token of each text
    points, kinds = points_and_classes(joined)
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    text_starts = offsets_of(lengths + 1)[:-1]
    if unit == "character":
        begins = np.delete(np.arange(len(points)), text_starts + lengths)
        ends = begins + 1
        hashes = mix((points[begins].astype(np.uint64) + np.uint64(1)) * STEP)
    else:
        letters = kinds == LETTER
        borders = (kinds == SINGLE) | (kinds == SYMBOL) if symbols else kinds == SINGLE
        begin = borders.copy()
        begin[1:] |= letters[1:] & ~letters[:-1]
        begin[0] |= letters[0]
        end = borders
        end[:-1] |= letters[:-1] & ~letters[1:]
        begins, ends = np.flatnonzero(begin), np.flatnonzero(end) + 1
        forward, backward = powers(1 << max(16, len(points).bit_length()))
        sums = np.zeros(len(points) + 1, np.uint64)
        terms = sums[1:]
        np.add(points, np.uint64(1), out=terms, dtype=np.uint64)
        terms *= forward[: len(points)]
        np.cumsum(terms, out=terms)
        hashes = mix((sums[ends] - sums[begins]) * backward[begins])
    offsets = np.append(np.searchsorted(begins, text_starts), len(begins)).astype(np.int64)
    base = np.repeat(text_starts, np.diff(offsets))
    return Tokens(Ragged(hashes, offsets), begins - base, ends - base)


def grams(tokens: Ragged, size: int, *, padded: bool) -> Ragged:
    """Hashes of the runs of `size` tokens of each text in their order, with repetitions."""
    counts = tokens.lengths()
    margin = size - 1 if padded else 0
    filled = np.where(counts > 0, counts + 2 * margin, 0)
    windows = np.maximum(filled - size + 1, 0)
    starts = offsets_of(filled)
    values = np.full(starts[-1] + size, PADDING)
    shift = np.repeat(starts[:-1] + margin - tokens.offsets[:-1], counts)
    values[np.arange(len(tokens.values)) + shift] = tokens.values
    total = values[: starts[-1]].copy()
    for ahead in range(1, size):
        total *= STEP
        total += values[ahead : ahead + len(total)]
    offsets = offsets_of(windows)
    places = np.arange(offsets[-1]) + np.repeat(starts[:-1] - offsets[:-1], windows)
    return Ragged(mix(total[places]), offsets)


def distinct(grams: Ragged) -> Ragged:
    """Each text's values in ascending order, every value once."""
    values, offsets = grams.values.copy(), grams.offsets
    bounds = offsets.tolist()
    for index in range(len(bounds) - 1):
        values[bounds[index] : bounds[index + 1]].sort()
    first = np.ones(len(values), np.bool_)
    first[1:] = values[1:] != values[:-1]
    filled = offsets[:-1][offsets[:-1] < offsets[1:]]
    first[filled] = True
    before = offsets_of(first)
    return Ragged(values[first], before[offsets])


def shingles_of(texts: Sequence[str], shingling: Shingling, beginnings: Sequence[int]) -> tuple[Ragged, I64]:
    """The set of shingles of each folded text, ascending, and how many of them end in its beginning.

    `beginnings` holds the length of each text's beginning in characters. A text without tokens has no shingles.
    """
    tokens = tokens_of(texts, shingling.unit)
    in_order = grams(tokens.hashes, shingling.size, padded=True)
    begun = np.repeat(np.asarray(beginnings, np.int64), tokens.hashes.lengths())
    tokens_before = np.append(0, np.cumsum(tokens.starts < begun))
    counts = tokens_before[tokens.hashes.offsets[1:]] - tokens_before[tokens.hashes.offsets[:-1]]
    return distinct(in_order), distinct(in_order.first(counts)).lengths()
