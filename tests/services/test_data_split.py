"""Shares, groups that stay together, and parts that are never empty."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorasmith.errors import InvalidData
from lorasmith.schemas.data import DataPreparationSpec, Example, Part
from lorasmith.services.data_index import ImportIndex
from lorasmith.services.data_split import assign_parts, drawn_part, exact_counts, group_position


@dataclass(frozen=True)
class Split:
    part_of_row: dict[int, Part]
    note: str | None


def split_examples(examples: list[Example], pinned: dict[int, Part], spec: DataPreparationSpec) -> Split:
    """What an import does with its index, and where each row then falls."""
    with ImportIndex() as index:
        for example in examples:
            position = group_position(example.group, spec.salt)
            index.add_to_group(example.group, position, pinned.get(example.row))
        note = assign_parts(index, Counter(pinned.values()), spec)
        parts = {example.row: pinned.get(example.row) or index.part_of(example.group) for example in examples}
        return Split(parts, note)


def examples_with(groups: Iterable[str]) -> list[Example]:
    return [Example(id=f"{row:016x}", group=group, row=row, text="a") for row, group in enumerate(groups, start=1)]


def spec_of(
    split: tuple[float, float, float] = (0.8, 0.1, 0.1), exact: bool = False, salt: str = "s"
) -> DataPreparationSpec:
    return DataPreparationSpec(split=split, exact=exact, salt=salt)


def sizes_of(part_of_row: dict[int, Part]) -> dict[str, int]:
    counts = Counter(part_of_row.values())
    return {part: counts[part] for part in ("train", "val", "test")}


def test_the_position_of_a_group_is_the_first_eight_bytes_of_the_salted_digest() -> None:
    # printf 's\0g' | sha256sum
    assert group_position("g", "s") == 0xCA13D1B63F8E913D / 2**64


@pytest.mark.parametrize(
    ("num_rows", "split", "counts"),
    [
        (298, (0.8, 0.1, 0.1), {"train": 238, "val": 29, "test": 31}),
        (100, (0.29, 0.01, 0.7), {"train": 29, "val": 1, "test": 70}),
        (15, (0.9, 0.1, 0.0), {"train": 13, "val": 2}),
        (7, (1.0, 0.0, 0.0), {"train": 7}),
    ],
)
def test_exact_counts_round_down_and_give_the_rest_to_the_last(
    num_rows: int, split: tuple[float, float, float], counts: dict[str, int]
) -> None:
    assert exact_counts(num_rows, split) == counts


def test_298_rows_are_cut_as_the_cpu_training_guide_says() -> None:
    split = split_examples(examples_with(map(str, range(298))), {}, spec_of(exact=True))
    assert sizes_of(split.part_of_row) == {"train": 238, "val": 29, "test": 31}
    assert split.note is None


def test_large_sets_come_within_three_points_of_the_shares() -> None:
    split = split_examples(examples_with(map(str, range(5000))), {}, spec_of())
    sizes = sizes_of(split.part_of_row)
    # 3 points are 5.3 standard deviations of the train share at 5,000 groups
    assert abs(sizes["train"] / 5000 - 0.8) < 0.03
    assert abs(sizes["val"] / 5000 - 0.1) < 0.03


def test_a_large_set_that_misses_its_shares_says_so() -> None:
    split = split_examples(examples_with(["big"] * 900 + [str(n) for n in range(100)]), {}, spec_of())
    assert split.note is not None
    assert "because whole groups were assigned by their hash: --exact comes nearer" in split.note


def test_adding_rows_never_moves_old_ones() -> None:
    groups = [str(n) for n in range(200)]
    before = split_examples(examples_with(groups), {}, spec_of()).part_of_row
    after = split_examples(examples_with(groups + [f"new {n}" for n in range(100)]), {}, spec_of()).part_of_row
    assert {row: after[row] for row in before} == before


def test_another_salt_gives_another_split() -> None:
    examples = examples_with(map(str, range(200)))
    first, second = (split_examples(examples, {}, spec_of(salt=salt)).part_of_row for salt in ("a", "b"))
    assert first != second


shares = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.9, 0.0, 0.1), (0.98, 0.01, 0.01), (1.0, 0.0, 0.0)])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), shares, st.booleans())
@settings(max_examples=200, deadline=None)
def test_groups_stay_together_and_no_part_with_a_share_is_empty(
    numbers: list[int], split: tuple[float, float, float], exact: bool
) -> None:
    examples = examples_with(map(str, numbers))
    part_of_row = split_examples(examples, {}, spec_of(split, exact)).part_of_row
    assert set(part_of_row) == set(range(1, len(numbers) + 1))
    parts_of_group = {(example.group, part_of_row[example.row]) for example in examples}
    assert len(parts_of_group) == len(set(numbers))
    wanted = {part for part, share in zip(("train", "val", "test"), split, strict=True) if share > 0}
    assert set(part_of_row.values()) == (wanted if len(set(numbers)) >= len(wanted) else {"train"})


def test_a_part_that_came_out_empty_takes_the_nearest_group_and_says_so() -> None:
    split = split_examples(examples_with(["a", "b", "c"]), {}, spec_of((0.98, 0.01, 0.01)))
    assert sizes_of(split.part_of_row) == {"train": 1, "val": 1, "test": 1}
    assert split.note is not None
    assert "val came out empty, so the nearest group was moved there from train" in split.note
    positions = {example.group: group_position(example.group, "s") for example in examples_with(["a", "b", "c"])}
    lowest = min(positions, key=lambda group: positions[group])
    assert split.part_of_row["abc".index(lowest) + 1] == "train"


def test_too_few_groups_all_go_to_train_and_the_note_says_so() -> None:
    split = split_examples(examples_with(["a", "a", "b"]), {}, spec_of())
    assert set(split.part_of_row.values()) == {"train"}
    assert split.note == "2 groups cannot fill 3 parts: all are in train"


def test_a_row_that_names_its_part_takes_its_group_along() -> None:
    split = split_examples(examples_with(["a", "a", *map(str, range(50))]), {2: "test"}, spec_of(exact=True))
    assert split.part_of_row[1] == split.part_of_row[2] == "test"
    assert sizes_of(split.part_of_row) == {"train": 40, "val": 5, "test": 7}


def test_rows_of_one_group_that_name_two_parts_fall_where_they_say_and_are_reported() -> None:
    split = split_examples(examples_with("aabbccdd"), {1: "train", 2: "test"}, spec_of())
    assert (split.part_of_row[1], split.part_of_row[2]) == ("train", "test")
    assert split.note is not None
    assert "1 group in more than one part, as the field `split` asks" in split.note


def test_named_parts_that_leave_nothing_for_train_are_refused() -> None:
    with pytest.raises(InvalidData) as caught:
        split_examples(examples_with("abc"), {1: "test", 2: "val", 3: "test"}, spec_of())
    assert caught.value.message == (
        "no row is left for train: all 3 ask for another part, in their field `split` or by the name of their file or folder"
    )


def split_labelled(
    rows: list[tuple[str, str]], split: tuple[float, float, float], salt: str = "s"
) -> tuple[list[Part], str | None]:
    """The part of each row of (group, label), as an import with `--stratify label` decides it, and its note."""
    spec = DataPreparationSpec(split=split, salt=salt, stratify="label")
    with ImportIndex() as index:
        for group, _ in rows:
            index.add_to_group(group, group_position(group, salt), None)
        note = assign_parts(index, {}, spec, rows)
        return [index.part_of(group) for group, _ in rows], note


labels = st.sampled_from("abc")
labelled = st.lists(labels, min_size=30, max_size=150).map(
    lambda found: [(str(number), label) for number, label in enumerate(found)]
)
all_parts = st.sampled_from([(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (0.7, 0.15, 0.15), (1 / 3, 1 / 3, 1 / 3)])


@given(labelled, all_parts, st.text(max_size=3))
@settings(max_examples=100, deadline=None)
def test_within_a_label_no_part_has_more_than_its_share_rounded_up(
    rows: list[tuple[str, str]], split: tuple[float, float, float], salt: str
) -> None:
    parts, _ = split_labelled(rows, split, salt)
    for label in "abc":
        counts = Counter(part for part, (_, found) in zip(parts, rows, strict=True) if found == label)
        for part, share in zip(("train", "val", "test"), split, strict=True):
            assert counts[part] <= math.ceil(share * counts.total() - 1e-9)


@given(
    st.lists(st.tuples(st.integers(0, 40), labels), min_size=40, max_size=120),
    st.lists(st.tuples(st.integers(20, 90), labels), max_size=60),
    all_parts,
)
@settings(max_examples=100, deadline=None)
def test_rows_behind_the_old_ones_never_move_them_with_labels_either(
    old: list[tuple[int, str]], new: list[tuple[int, str]], split: tuple[float, float, float]
) -> None:
    first = [(str(group), label) for group, label in old]
    second = [*first, *((str(group), label) for group, label in new)]
    before, note = split_labelled(first, split)
    after, _ = split_labelled(second, split)
    assume(note is None)  # a part that came out empty takes a group, which it need not when there are more
    assert after[: len(first)] == before


def test_a_thousand_labelled_rows_have_their_shares_to_the_row() -> None:
    rows = [(str(number), "ab"[number % 5 == 0]) for number in range(1000)]
    parts, _ = split_labelled(rows, (0.8, 0.1, 0.1))
    counts = Counter(zip(parts, (label for _, label in rows), strict=True))
    assert {key: counts[key] for key in sorted(counts)} == {
        ("test", "a"): 80,
        ("test", "b"): 20,
        ("train", "a"): 640,
        ("train", "b"): 160,
        ("val", "a"): 80,
        ("val", "b"): 20,
    }


def test_the_order_of_the_parts_is_not_periodic_and_follows_the_salt() -> None:
    rows = [(str(number), "a") for number in range(200)]
    first, second = (split_labelled(rows, (0.8, 0.1, 0.1), salt)[0] for salt in ("s", "t"))
    assert first != second
    assert len({tuple(first[start : start + 10]) for start in range(0, 200, 10)}) > 5


def test_a_part_is_drawn_from_those_that_miss_rows() -> None:
    # of 10 rows 8, 1 and 1 are due; 8 and 0 and 1 are there: val misses one
    assert drawn_part(0.0, {"train": 8, "val": 0, "test": 1}, (0.8, 0.1, 0.1)) == "val"
    # of the first row 0.8, 0.1 and 0.1 are due
    assert [drawn_part(at, Counter(), (0.8, 0.1, 0.1)) for at in (0.79, 0.81, 0.95)] == ["train", "val", "test"]


def test_rows_that_name_their_part_are_left_out_of_the_shares_of_a_label() -> None:
    spec = DataPreparationSpec(stratify="label", salt="s")
    rows = [(str(number), "a") for number in range(40)]
    with ImportIndex() as index:
        for group, _ in rows:
            index.add_to_group(group, group_position(group, "s"), "test" if int(group) < 20 else None)
        assign_parts(index, {"test": 20}, spec, rows)
        counts = Counter(index.part_of(group) for group, _ in rows[20:])
    assert counts == {"train": 16, "val": 2, "test": 2}


def test_exact_and_stratified_at_once_is_refused() -> None:
    with pytest.raises(ValueError, match="`exact` cuts all rows and `stratify` each label: give one of them"):
        DataPreparationSpec(exact=True, stratify="label")
