"""The same search with datasketch and with rensa: their signatures and their LSH, everything else as ours states it.

Rows are folded, exact duplicates leave first, shingles are runs of three tokens, the banding is 32 x 8 of 256
permutations, every candidate pair is compared exactly, clusters come from union-find and a ledger is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dedup_corpus import read_rows

from lorasmith.services.data_duplicates.texts import folded

PERMUTATIONS, BANDS = 256, 32
ROWS_AT_ONCE = 4096
TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")

Shingles = list[str]
Candidates = Iterator[tuple[int, list[int]]]  # a position and positions that share a band with it


def shingles(text: str) -> Shingles:
    tokens = ["", "", *TOKEN.findall(text), "", ""]
    return list({" ".join(tokens[place : place + 3]) for place in range(len(tokens) - 2)})


def datasketch_candidates(chunk: list[Shingles], first: int, lsh: object) -> Candidates:
    from datasketch import MinHash

    encoded = [[shingle.encode() for shingle in row] for row in chunk]
    for position, signature in enumerate(MinHash.bulk(encoded, num_perm=PERMUTATIONS), start=first):
        yield position, lsh.query(signature)  # type: ignore[attr-defined]
        lsh.insert(position, signature, check_duplication=False)  # type: ignore[attr-defined]


def rensa_candidates(chunk: list[Shingles], first: int, lsh: object) -> Candidates:
    from rensa import RMinHash

    signatures = RMinHash.from_token_sets(chunk, PERMUTATIONS, 42)
    lsh.insert_many(signatures, first)  # type: ignore[attr-defined]
    found = lsh.query_all(signatures)  # type: ignore[attr-defined]
    yield from enumerate(found, start=first)


def new_datasketch() -> object:
    from datasketch import MinHashLSH

    return MinHashLSH(num_perm=PERMUTATIONS, params=(BANDS, PERMUTATIONS // BANDS))


def new_rensa() -> object:
    from rensa import RMinHashLSH

    return RMinHashLSH(0.8, PERMUTATIONS, BANDS)


PEERS: dict[str, tuple[Callable[[], object], Callable[[list[Shingles], int, object], Candidates]]] = {
    "datasketch": (new_datasketch, datasketch_candidates),
    "rensa": (new_rensa, rensa_candidates),
}


def search(peer: str, corpus: Path, ledger: Path, threshold: float) -> int:
    """Read, hash, compare, write; how many rows stay."""
    make, candidates = PEERS[peer]
    lsh = make()
    line_of_text: dict[str, int] = {}
    exact: dict[int, int] = {}
    lines: list[int] = []
    sets: list[frozenset[str]] = []
    parent: list[int] = []
    similarity: dict[int, float] = {}

    def root(position: int) -> int:
        while parent[position] != position:
            parent[position] = position = parent[parent[position]]
        return position

    def texts() -> Iterator[tuple[int, str]]:
        for line, instruction, output in read_rows(corpus):
            text = folded(f"{instruction}\n{output}")
            if (original := line_of_text.setdefault(text, line)) == line:
                yield line, text
            else:
                exact[line] = original

    for chunk in batches(texts()):
        first = len(sets)
        rows = [shingles(text) for _, text in chunk]
        lines += [line for line, _ in chunk]
        sets += map(frozenset, rows)
        parent += range(first, first + len(chunk))
        for position, others in candidates(rows, first, lsh):
            mine = sets[position]
            for other in others:
                if other < position:
                    shared = len(mine & sets[other])
                    value = shared / (len(mine) + len(sets[other]) - shared)
                    if value >= threshold:
                        low, high = sorted((root(position), root(other)))
                        parent[high] = low
                        similarity[position] = max(value, similarity.get(position, 0))
    position_of = {line: position for position, line in enumerate(lines)}
    kept = 0
    with ledger.open("w", encoding="utf-8") as file:
        for line in range(len(lines) + len(exact)):
            if line in exact:
                record: dict[str, object] = {"row": line, "kind": "exact", "of": exact[line]}
            else:
                position = position_of[line]
                stays = root(position) == position
                kept += stays
                near = {"kind": "near", "of": lines[root(position)], "similarity": similarity.get(position)}
                record = {"row": line, **({"kind": "kept"} if stays else near)}
            file.write(json.dumps(record) + "\n")
    return kept


def batches(rows: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    batch: list[tuple[int, str]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == ROWS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch
