"""Which rows hold items of a benchmark, or of another split: exact, by long runs of words, or by similarity.

Three kinds of hit, the strongest first; a row and an item are reported once, with the strongest:

- `exact`: the folded texts are equal.
- `words`: a run of 13 words of the item stands in the row, whatever punctuation is between them (as in the
  decontamination of GPT-3: Brown et al. 2020, appendix C). Items of 8 to 12 words are looked for as a whole; shorter
  ones only as exact or similar.
- `similar`: the Jaccard similarity of the sets of character 5-grams reaches the threshold.

A run of words that is in more than 10 items is a template of the benchmark and is left out; `Items.templates` counts
those runs. The items are held in memory, about 3 KB each; rows pass by in chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

import numpy as np

from lorasmith.services.data_duplicates.shingles import (
    I64,
    U64,
    Ragged,
    Shingling,
    Tokens,
    grams,
    offsets_of,
    shingles_of,
    tokens_of,
)
from lorasmith.services.data_duplicates.signatures import PERMUTATIONS, band_keys, rows_per_band, signatures_of
from lorasmith.services.data_duplicates.similarity import jaccard
from lorasmith.services.data_duplicates.texts import digest, folded

HitKind = Literal["exact", "words", "similar"]

RUN = 13  # words
SHORTEST_ITEM = 8
MOST_ITEMS_OF_A_RUN = 10
CHARACTERS = Shingling("character", 5)
DEFAULT_SIMILARITY = 0.8
TEXTS_AT_ONCE = 1024


class Text(NamedTuple):
    """A row or a benchmark item, with a name of the caller's."""

    id: int | str
    text: str


class Hit(NamedTuple):
    """One row that holds one item. `text` is what matches, folded; `similarity` is given for `similar` only."""

    row: int | str
    item: int | str
    kind: HitKind
    text: str
    similarity: float | None = None


@dataclass(frozen=True)
class Lookup:
    """Keys in ascending order, and the item that each is of."""

    keys: U64
    items: I64

    def matches(self, wanted: U64) -> tuple[I64, I64]:
        """(place in `wanted`, item) of every equal key."""
        begins = np.searchsorted(self.keys, wanted, side="left")
        counts = np.searchsorted(self.keys, wanted, side="right") - begins
        offsets = offsets_of(counts)
        places = np.repeat(np.arange(len(wanted)), counts)
        return places, self.items[np.arange(offsets[-1]) - offsets[places] + begins[places]]


def lookup(keys: U64, items: I64) -> Lookup:
    order = np.argsort(keys, kind="stable")
    return Lookup(keys[order], items[order])


@dataclass(frozen=True)
class Items:
    """Benchmark items, ready to be looked for."""

    ids: list[int | str]
    of_digest: dict[bytes, list[int]]
    runs: dict[int, Lookup]  # by their length in words
    templates: int
    threshold: float
    characters: Ragged
    bands: list[Lookup]


def read_items(items: Iterable[Text], similarity: float = DEFAULT_SIMILARITY) -> Items:
    """Hash the items once. Raises `InvalidSpec` for a similarity outside 0.4 to 1."""
    width = rows_per_band(similarity)
    held = list(items)
    texts = [folded(item.text) for item in held]
    of_digest: dict[bytes, list[int]] = {}
    for number, text in enumerate(texts):
        of_digest.setdefault(digest(text), []).append(number)
    tokens = tokens_of(texts, "word", symbols=False).hashes
    runs, templates = {}, 0
    for length in range(SHORTEST_ITEM, RUN + 1):
        chosen = np.flatnonzero(tokens.lengths() >= RUN if length == RUN else tokens.lengths() == length)
        if len(chosen):
            runs[length], left_out = runs_of_items(grams(tokens.take(chosen), length, padded=False), chosen)
            templates += left_out
    characters, _ = shingles_of(texts, CHARACTERS, [0] * len(texts))
    with_characters = np.flatnonzero(characters.lengths() > 0)
    signatures = signatures_of(characters)[with_characters]
    bands = [
        lookup(band_keys(signatures[:, band * width : (band + 1) * width], band), with_characters)
        for band in range(PERMUTATIONS // width)
    ]
    return Items([item.id for item in held], of_digest, runs, templates, similarity, characters, bands)


def runs_of_items(found: Ragged, items: I64) -> tuple[Lookup, int]:
    """Distinct (run, item) without the runs of more than 10 items, and how many of those there are."""
    owner = np.repeat(items, found.lengths())
    pairs = np.unique(np.stack([found.values, owner.astype(np.uint64)]), axis=1)
    counts = np.unique_counts(pairs[0]).counts
    rare = np.repeat(counts <= MOST_ITEMS_OF_A_RUN, counts)
    return Lookup(pairs[0][rare], pairs[1][rare].astype(np.int64)), int((counts > MOST_ITEMS_OF_A_RUN).sum())


def contaminated(rows: Iterable[Text], items: Items) -> Iterator[Hit]:
    """Every hit, in the order of the rows; a row's hits in the order of the items."""
    source = iter(rows)
    while chunk := list(islice(source, TEXTS_AT_ONCE)):
        yield from hits_of(chunk, items)


def hits_of(rows: Sequence[Text], items: Items) -> list[Hit]:
    texts = [folded(row.text) for row in rows]
    found: dict[tuple[int, int], Hit] = {}

    def report(row: int, item: int, kind: HitKind, text: str, similarity: float | None = None) -> None:
        found.setdefault((row, item), Hit(rows[row].id, items.ids[item], kind, text, similarity))

    for row, text in enumerate(texts):
        for item in items.of_digest.get(digest(text), []):
            report(row, item, "exact", text)
    words = tokens_of(texts, "word", symbols=False)
    for length in sorted(items.runs, reverse=True):
        for row, item, text in shared_runs(texts, words, length, items.runs[length]):
            report(row, item, "words", text)
    for row, item, similarity in similar_items(texts, items):
        if (row, item) not in found:
            report(row, item, "similar", shared_characters(texts[row], items.characters[item]), similarity)
    return [found[place] for place in sorted(found)]


def shared_runs(texts: Sequence[str], words: Tokens, length: int, runs: Lookup) -> Iterator[tuple[int, int, str]]:
    """(row, item, text) of every row and item with a common run; the text is the longest stretch of such runs."""
    windows = grams(words.hashes, length, padded=False)
    places, matched = runs.matches(windows.values)
    owners = np.searchsorted(windows.offsets, places, side="right") - 1
    order = np.lexsort((places, matched, owners))
    owner, item, place = owners[order], matched[order], places[order]
    new_pair = np.append(True, (owner[1:] != owner[:-1]) | (item[1:] != item[:-1]))[: len(order)]
    new_stretch = new_pair | np.append(True, place[1:] != place[:-1] + 1)[: len(order)]
    begins = np.flatnonzero(new_stretch)
    sizes = np.diff(np.append(begins, len(order)))
    longest: dict[tuple[int, int], tuple[int, int]] = {}
    for begin, size in zip(begins.tolist(), sizes.tolist(), strict=True):
        pair = (int(owner[begin]), int(item[begin]))
        if size > longest.get(pair, (0, 0))[0]:
            longest[pair] = (size, int(place[begin] - windows.offsets[owner[begin]]))
    for (row, number), (size, first) in longest.items():
        token = int(words.hashes.offsets[row]) + first
        yield row, number, texts[row][words.starts[token] : words.ends[token + size + length - 2]]


def similar_items(texts: Sequence[str], items: Items) -> Iterator[tuple[int, int, float]]:
    """(row, item, similarity) of the pairs at or above the threshold that share a band."""
    characters, _ = shingles_of(texts, CHARACTERS, [0] * len(texts))
    filled = np.flatnonzero(characters.lengths() > 0)
    signatures = signatures_of(characters)[filled]
    width = rows_per_band(items.threshold)
    pairs: list[I64] = []
    for band, keys in enumerate(items.bands):
        places, matched = keys.matches(band_keys(signatures[:, band * width : (band + 1) * width], band))
        pairs.append(np.stack([filled[places], matched]))
    left, right = np.unique(np.concatenate(pairs, axis=1), axis=1)
    similarity = jaccard(characters, left, items.characters, right)
    for place in np.flatnonzero(similarity >= items.threshold).tolist():
        yield int(left[place]), int(right[place]), float(similarity[place])


def shared_characters(text: str, item: U64) -> str:
    """The longest stretch of the text whose character 5-grams are all in the item."""
    windows = grams(tokens_of([text], "character").hashes, CHARACTERS.size, padded=False).values
    if not len(windows):
        return text
    shared = np.append(np.isin(windows, item), False)
    breaks = np.flatnonzero(~shared)
    sizes = np.diff(np.append(-1, breaks)) - 1
    longest = int(np.argmax(sizes))
    first = int(breaks[longest] - sizes[longest])
    return text[first : first + int(sizes[longest]) + CHARACTERS.size - 1] if sizes[longest] else ""


@dataclass(frozen=True)
class Overlap:
    """How many of the `wanted` texts, such as the instructions of the test part, another set holds."""

    wanted: int
    exact: int
    words: int
    similar: int
    hits: list[Hit]

    @property
    def share(self) -> float:
        """Share of the wanted texts with any hit, 0 to 1."""
        return (self.exact + self.words + self.similar) / self.wanted if self.wanted else 0.0


def overlap(rows: Iterable[Text], wanted: Iterable[Text], similarity: float = DEFAULT_SIMILARITY) -> Overlap:
    """What of `wanted` is in `rows`: leakage between splits. Each wanted text counts once, by its strongest hit.

    With the instructions of both as texts this is the instruction overlap; ids of `wanted` must differ.
    """
    items = read_items(wanted, similarity)
    hits = list(contaminated(rows, items))
    strength: dict[HitKind, int] = {"exact": 0, "words": 1, "similar": 2}
    strongest: dict[int | str, HitKind] = {}
    for hit in hits:
        strongest[hit.item] = min(strongest.get(hit.item, hit.kind), hit.kind, key=strength.__getitem__)
    counts = Counter(strongest.values())
    return Overlap(len(items.ids), counts["exact"], counts["words"], counts["similar"], hits)
