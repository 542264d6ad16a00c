"""What may not be shared between the pretraining text, the train split and the test split."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

NGRAM_WORDS = 13


def words(text: str) -> list[str]:
    """Identifiers, numbers and single punctuation marks, lower-cased; white space does not count."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def ngrams(text: str, size: int = NGRAM_WORDS) -> Iterator[int]:
    """Hashes of the runs of `size` words; a text shorter than that has none."""
    tokens = words(text)
    for start in range(len(tokens) - size + 1):
        yield hash(tuple(tokens[start : start + size]))


def ngram_set(texts: Iterable[str]) -> set[int]:
    return {gram for text in texts for gram in ngrams(text)}


def shares_ngram(text: str, seen: set[int]) -> bool:
    return any(gram in seen for gram in ngrams(text))


def normalised(text: str) -> str:
    return " ".join(words(text))
