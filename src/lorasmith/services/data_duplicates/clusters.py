"""Pairs to clusters, and the row of each that stays."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorasmith.services.data_duplicates.shingles import I64, U64
from lorasmith.services.data_duplicates.similarity import F64, decode

Differ = Callable[[I64, I64, F64], NDArray[np.bool_]]  # rows, rows, similarity: true where they are no duplicates
Similarity = Callable[[I64, I64], F64]


@dataclass(frozen=True)
class Clusters:
    """For each position the kept one of its cluster, the similarity with it and a link of the way to it, or -1."""

    kept_of: I64
    similarity: F64
    via: I64


def components(size: int, left: I64, right: I64) -> I64:
    """The smallest position that each position is connected with: union-find for whole arrays at once.

    Each round hooks roots to smaller neighbouring roots and then shortens all paths (Shiloach, Vishkin 1982).
    """
    label = np.arange(size)
    while True:
        first, second = label[left], label[right]
        apart = first != second
        if not apart.any():
            return label
        left, right, first, second = left[apart], right[apart], first[apart], second[apart]
        np.minimum.at(label, np.maximum(first, second), np.minimum(first, second))
        while not np.array_equal(above := label[label], label):
            label = above


def cluster(size: int, pairs: U64, rank: I64, threshold: float, differ: Differ, similarity: Similarity) -> Clusters:
    """Clusters of linked positions; the one with the smallest rank is kept.

    A member that may not be a duplicate of the kept one, though it is linked through others, is left over, and the
    left over are clustered again among themselves.
    """
    kept_of, measured, via = np.arange(size), np.ones(size), np.full(size, -1)
    left, right = decode(pairs)
    while len(left):
        nodes, ends = np.unique(np.concatenate([left, right]), return_inverse=True)
        near, far = ends[: len(left)], ends[len(left) :]
        label = components(len(nodes), near, far)
        kept = np.full(len(nodes), -1)
        by_rank = np.argsort(-rank[nodes])
        kept[label[by_rank]] = by_rank  # the last one written has the smallest rank
        kept = kept[label]
        values = similarity(nodes, nodes[kept])
        left_over = differ(nodes, nodes[kept], values)
        dropped = np.flatnonzero((kept != np.arange(len(nodes))) & ~left_over)
        kept_of[nodes[dropped]] = nodes[kept[dropped]]
        measured[nodes[dropped]] = values[dropped]
        distant = dropped[values[dropped] < threshold]
        via[nodes[distant]] = nodes[steps_towards(kept, near, far, distant)]
        stay = left_over[near] & left_over[far]
        left, right = left[stay], right[stay]
    return Clusters(kept_of, measured, via)


def steps_towards(kept: I64, left: I64, right: I64, wanted: I64) -> I64:
    """For each wanted node its neighbour on a shortest way to the kept node of its cluster."""
    sources = np.unique(kept[wanted])
    concerned = np.isin(kept[left], sources)
    neighbours: dict[int, list[int]] = {}
    for one, other in zip(left[concerned].tolist(), right[concerned].tolist(), strict=True):
        neighbours.setdefault(one, []).append(other)
        neighbours.setdefault(other, []).append(one)
    step = {source: source for source in sources.tolist()}
    waiting = deque(step)
    while waiting:
        node = waiting.popleft()
        for neighbour in neighbours[node]:
            if neighbour not in step:
                step[neighbour] = node
                waiting.append(neighbour)
    return np.array([step[node] for node in wanted.tolist()], np.int64)
