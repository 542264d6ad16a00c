"""What two texts must share to be the same text for a search: their folded forms are equal.

An import's exact duplicates go by a stricter rule, `data_digests.canonical_text`, where case counts.
"""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Literal, NamedTuple

Key = Literal["whole", "instruction", "answer"]
KEYS: tuple[Key, ...] = ("whole", "instruction", "answer")


class Row(NamedTuple):
    """One row to compare. `id` is a number of the caller, such as the line in the file; plain text has no answer."""

    id: int
    instruction: str
    answer: str = ""


def folded(text: str) -> str:
    """NFKC, full case folding and NFKC again (folding can undo it), with white space as single blanks.

    Applying it twice changes nothing. Characters without a width, such as U+200B, are kept.
    """
    if text.isascii():
        return " ".join(text.lower().split())
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.split())


def digest(text: str, size_bytes: int = 16) -> bytes:
    """BLAKE2b of the text; half of a surrogate pair, which UTF-8 has no form for, counts as a character."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=size_bytes).digest()
