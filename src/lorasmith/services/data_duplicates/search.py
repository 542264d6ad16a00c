"""Which rows stay: exact duplicates, near-duplicate clusters and groups with one instruction, out of an index.

    index = write_index(rows, folder)
    decision = decide(index, threshold=0.8)
    for finding in decision.findings(): ...
    stricter = decide(open_index(folder), threshold=0.9)  # hashes nothing again

Two rows are exact duplicates when their folded texts are equal, near duplicates when the Jaccard similarity of
their shingle sets is at least the threshold. Near duplicates of near duplicates are in one cluster, and the cluster's
best row stays: the longest answer, then the longest text, then the earliest row.

When whole rows are compared, rows with equal instructions are near duplicates only when what follows the instruction
reaches the threshold by itself; else they are a group. And rows whose answers differ while one of the two has fewer than
32 characters are none: a label or a number is not a near copy of another one. When instructions are compared, rows with
one instruction stay or go together, save for equal answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lorasmith.services.data_duplicates.candidates import candidates
from lorasmith.services.data_duplicates.clusters import Clusters, cluster, components
from lorasmith.services.data_duplicates.crowds import link_crowd
from lorasmith.services.data_duplicates.index import Index, best_first
from lorasmith.services.data_duplicates.parallel import Workers
from lorasmith.services.data_duplicates.shingles import I64
from lorasmith.services.data_duplicates.signatures import candidate_probability, rows_per_band
from lorasmith.services.data_duplicates.similarity import F64, decode, jaccard

SHORT_ANSWER = 32  # characters
COMPARISONS_IN_CROWDS = 20_000_000  # about 20 s
FINDINGS_AT_ONCE = 65_536
FEW_ROWS = 100_000  # decided within 2 s by one process, without starting others

FindingKind = Literal["kept", "exact", "near"]


class Finding(NamedTuple):
    """What became of one row.

    `of` is the kept row that stands for it, `similarity` the exact Jaccard similarity with that row. It can be below
    the threshold where the row belongs to the cluster through others; `via` is then a row of the cluster whose
    similarity with this one is at least the threshold. `group` is the first kept row with the same instruction, for
    kept rows of which there are several with different answers.
    """

    id: int
    kind: FindingKind
    of: int | None = None
    similarity: float | None = None
    via: int | None = None
    group: int | None = None


@dataclass(frozen=True)
class Summary:
    """Counts of rows, and what the candidate stage can promise. `uncompared_pairs` is an upper bound, normally 0."""

    rows: int
    kept: int
    exact: int
    near: int
    near_clusters: int
    in_groups: int
    recall_at_threshold: float | None
    uncompared_pairs: int


@dataclass(frozen=True)
class Decision:
    """The fate of every row at one threshold; arrays have one entry a row, in the order of the index."""

    index: Index
    threshold: float | None
    of: I64  # position of the row that stands for it; its own when it is kept
    similarity: F64
    via: I64  # position, or -1
    group: I64  # position, or -1
    uncompared_pairs: int

    def findings(self) -> Iterator[Finding]:
        """One for each row, in the order of the index."""
        ids = np.asarray(self.index.id)
        for first in range(0, self.index.num_rows, FINDINGS_AT_ONCE):
            part = slice(first, first + FINDINGS_AT_ONCE)
            columns = (ids[part], self.kinds(part), ids[self.of[part]], self.similarity[part])
            named = (ids[self.via[part]], self.via[part] >= 0, ids[self.group[part]], self.group[part] >= 0)
            for id, kind, of, similarity, via, has_via, group, has_group in zip(
                *(column.tolist() for column in (*columns, *named)), strict=True
            ):
                if kind == 0:
                    yield Finding(id, "kept", group=group if has_group else None)
                else:
                    yield Finding(id, KINDS[kind], of, similarity, via if has_via else None)

    def kinds(self, part: slice = slice(None)) -> NDArray[np.intp]:
        """0 kept, 1 exact, 2 near."""
        of = self.of[part]
        positions = np.arange(self.index.num_rows)[part]
        exact = self.index.best[part] == self.index.best[of]
        return np.where(of == positions, 0, np.where(exact, 1, 2))

    def summary(self) -> Summary:
        kept, exact, near = np.bincount(self.kinds(), minlength=3).tolist()
        recall = None
        if self.threshold is not None:
            recall = candidate_probability(self.threshold, rows_per_band(self.threshold))
        near_clusters = len(np.unique(self.index.best[self.of[self.kinds() == 2]]))
        in_groups = int((self.group >= 0).sum())
        return Summary(self.index.num_rows, kept, exact, near, near_clusters, in_groups, recall, self.uncompared_pairs)


KINDS: tuple[FindingKind, ...] = ("kept", "exact", "near")


def decide(index: Index, threshold: float | None = 0.8, *, processes: int | None = None) -> Decision:
    """Decide at a threshold between 0.4 and 1; with None only exact duplicates go.

    The result is that of a search from the rows at this threshold, and does not depend on thresholds decided before.
    A pair at the threshold is found with probability 0.99 or more (`Summary.recall_at_threshold`), no pair below it.
    """
    ranked = best_first(index.answer_length, index.text_length)
    rank = np.empty(index.num_rows, np.int64)
    rank[ranked] = np.arange(index.num_rows)
    of = stand_in_of_equals(index, rank)
    similarity = np.ones(index.num_rows)
    via = np.full(index.num_rows, -1)
    uncompared = 0
    if threshold is not None and index.num_rows:
        with Workers(processes if index.num_rows > FEW_ROWS else 1) as workers:
            clusters, uncompared = near_clusters(index, threshold, rank, workers)
        best = np.asarray(index.best)
        dropped = clusters.kept_of[best] != best
        of[dropped] = clusters.kept_of[best[dropped]]
        similarity[dropped] = clusters.similarity[best[dropped]]
        via[dropped] = clusters.via[best[dropped]]
    return Decision(index, threshold, of, similarity, via, groups(index, of), uncompared)


def stand_in_of_equals(index: Index, rank: I64) -> I64:
    """The row that stays out of those with equal texts; with instructions compared, also of equal answers."""
    best = np.array(index.best)
    if index.key != "instruction":
        return best
    order = np.lexsort((rank, index.answer, best))
    same = (best[order[1:]] == best[order[:-1]]) & (index.answer[order[1:]] == index.answer[order[:-1]])
    begins = np.append(True, ~same)[: len(order)]
    result = np.empty_like(best)
    result[order] = order[begins][np.cumsum(begins) - 1]
    return result


def near_clusters(index: Index, threshold: float, rank: I64, workers: Workers) -> tuple[Clusters, int]:
    """Clusters of the best rows of each text, and an upper bound of the pairs that were not compared."""

    def differ(left: I64, right: I64, similarity: F64) -> NDArray[np.bool_]:
        if index.key != "whole":
            return np.zeros(len(left), np.bool_)
        return answers_differ(index, left, right, similarity, threshold)

    found = candidates(index, rows_per_band(threshold), workers)
    similar = found.similarity >= threshold
    pairs = found.pairs[similar]
    pairs = pairs[~differ(*decode(pairs), found.similarity[similar])]
    uncompared = 0
    if found.buckets:
        labels = components(index.num_rows, *decode(pairs))
        links = link_crowd(found.crowd, found.buckets, index.shingles, labels, threshold, differ, COMPARISONS_IN_CROWDS)
        pairs, uncompared = np.union1d(pairs, links.pairs), links.uncompared

    def similarity(left: I64, right: I64) -> F64:
        return jaccard(index.shingles, left, index.shingles, right)

    return cluster(index.num_rows, pairs, rank, threshold, differ, similarity), uncompared


def answers_differ(index: Index, left: I64, right: I64, similarity: F64, threshold: float) -> NDArray[np.bool_]:
    """Whether whole rows of this similarity are no duplicates, because their answers say something else.

    With equal instructions, whose c shingles both share, the rest decides: (shared - c) / (united - c) < threshold.
    """
    sizes = index.shingles.lengths()
    united = np.rint((sizes[left] + sizes[right]) / (1 + similarity))
    shared = sizes[left] + sizes[right] - united
    common = index.instruction_shingles[left].astype(np.int64)
    apart = (index.instruction[left] == index.instruction[right]) & (
        shared - common < threshold * (united - common) - 1e-9
    )
    short = np.minimum(index.answer_length[left], index.answer_length[right]) < SHORT_ANSWER
    return np.asarray((index.answer[left] != index.answer[right]) & (apart | short))


def groups(index: Index, of: I64) -> I64:
    """For each kept row the first kept row with its instruction, or -1 when it is the only one."""
    result = np.full(index.num_rows, -1)
    if index.key == "answer":
        return result
    kept = np.flatnonzero(of == np.arange(index.num_rows))
    _, first, member, counts = np.unique(
        index.instruction[kept], return_index=True, return_inverse=True, return_counts=True
    )
    several = counts[member] > 1
    result[kept[several]] = kept[first[member[several]]]
    return result
