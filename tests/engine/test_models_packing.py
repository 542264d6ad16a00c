"""Rows laid end to end, with and without shared beginnings."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.models.packing import SHARED_BLOCK, Tree, pack, shared_length, token_groups

BEGINNING = list(range(100, 100 + SHARED_BLOCK))
# Few distinct beginnings of several lengths, so that rows often share one, two or three stretches.
row_ids = st.lists(st.sampled_from([BEGINNING, [*BEGINNING, 7], [1], [2], [3, 3]]), min_size=1, max_size=6).map(
    lambda parts: [token for part in parts for token in part]
)
rows_of_ids = st.lists(row_ids, min_size=1, max_size=8)


def as_rows(ids: list[list[int]]) -> list[RenderedExample]:
    return [RenderedExample(n, row, [(n + i) % 3 > 0 for i in range(len(row))]) for n, row in enumerate(ids)]


@given(rows_of_ids)
def test_each_row_can_be_read_back_from_what_stands_before_its_tokens(ids: list[list[int]]) -> None:
    rows = as_rows(ids)
    tree = Tree(rows)
    tree.grow(list(range(len(rows))), 0, ())
    for row, places in zip(rows, tree.places, strict=True):
        assert [tree.ids[place] for place in places] == row.ids
    for segment in tree.segments:
        before = [place for part in segment.before for place in range(part.start, part.stop)]
        path = [*before, *range(segment.start, segment.start + segment.length)]
        assert any(places[: len(path)] == path for places in tree.places)
    assert sum(segment.length for segment in tree.segments) == len(tree.ids)


@given(rows_of_ids)
def test_sharing_labels_the_same_predictions(ids: list[list[int]]) -> None:
    rows = as_rows(ids)
    for share in (False, True):
        packed = pack(rows, share=share)
        expected = [row.ids[i] for row in rows for i in range(1, len(row.ids)) if row.trained[i]]
        assert packed.targets.tolist() == expected
        read = [row.ids[i - 1] for row in rows for i in range(1, len(row.ids)) if row.trained[i]]
        assert packed.ids[packed.labelled].tolist() == read


def test_whole_blocks_of_a_common_beginning_are_laid_out_once() -> None:
    system = [50 + n for n in range(40)]
    rows = as_rows([[*system, 1, 2], [*system, 3], system, [9, *system]])
    packed = pack(rows, share=True)
    assert len(packed.ids) == 32 + (8 + 2) + (8 + 1) + 8 + 41
    assert packed.ids[:40].tolist() == system
    assert len(pack(rows).ids) == 42 + 41 + 40 + 41


@example(ids=[BEGINNING, [*BEGINNING, 1], [*BEGINNING, 1, 1]], most=18)
@given(rows_of_ids, st.integers(1, 80))
def test_token_groups_hold_each_row_once_and_no_more_tokens_than_asked(ids: list[list[int]], most: int) -> None:
    rows = as_rows(ids)
    order = sorted(range(len(rows)), key=lambda index: rows[index].ids)
    for share in (False, True):
        groups = token_groups(order, rows, most, share=share)
        assert [index for group in groups for index in group] == order
        for group in groups:
            assert len(group) == 1 or len(pack([rows[index] for index in group], share=share).ids) <= most


def test_the_shared_length_is_in_whole_blocks() -> None:
    assert shared_length([[*BEGINNING, 2, 3], [*BEGINNING, 2, 4], [*BEGINNING, 2]]) == SHARED_BLOCK
    assert shared_length([BEGINNING * 2, BEGINNING * 2]) == 2 * SHARED_BLOCK
    assert shared_length([[1], [2]]) == 0
    assert shared_length([BEGINNING[:-1], BEGINNING]) == 0
