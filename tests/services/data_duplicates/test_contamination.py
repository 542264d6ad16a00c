import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.errors import InvalidSpec
from lorasmith.services.data_duplicates.contamination import Hit, Text, contaminated, overlap, read_items
from lorasmith.services.data_duplicates.texts import folded

REAL_DATA = Path(__file__).parents[4] / "shared" / "data"
QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)


def hits(rows: list[str], items: list[str], similarity: float = 0.8) -> list[Hit]:
    found = read_items([Text(f"item {number}", item) for number, item in enumerate(items)], similarity)
    return list(contaminated((Text(number, row) for number, row in enumerate(rows)), found))


def test_an_equal_text_is_an_exact_hit() -> None:
    found = hits(["something else", QUESTION.upper() + "\n"], [QUESTION])
    assert found == [Hit(1, "item 0", "exact", folded(QUESTION))]


def test_thirteen_words_in_a_row_are_a_hit_and_twelve_are_not() -> None:
    words = QUESTION.split()
    thirteen = "before " + " - ".join(words[2:15]).replace(",", "") + " after"  # punctuation does not count
    (found,) = hits([thirteen], [QUESTION])
    assert (found.kind, found.text) == ("words", folded(" - ".join(words[2:15]).replace(",", "")))
    assert hits(["before " + " ".join(words[3:15]) + " after"], [QUESTION]) == []


def test_a_calculation_that_two_rows_share_is_no_run_of_words() -> None:
    calculation = "48 / 2 = <<48/2=24>>24"  # 13 tokens, of which six are numbers
    assert hits([f"It is half, {calculation} clips."], [f"Half of them: {calculation} eggs, so 24."]) == []


def test_the_longest_stretch_is_named() -> None:
    row = "Solve: " + QUESTION.rstrip("?") + " and June?"
    (found,) = hits([row], [QUESTION])
    assert found.kind == "words"
    assert found.text == folded(QUESTION.rstrip("?"))


def test_scripts_without_spaces_have_a_word_for_each_character() -> None:
    (found,) = hits(["次の問いに答えよ。日本の首都は東京である。"], ["日本の首都は東京で"], similarity=0.95)
    assert (found.kind, found.text) == ("words", "日本の首都は東京で")


def test_an_item_of_eight_words_is_looked_for_as_a_whole() -> None:
    item = "what is the capital of France , please tell ?"
    (found,) = hits([f"Answer briefly. {item} Paris."], [item], similarity=0.95)
    assert (found.kind, found.text) == ("words", "what is the capital of france , please tell")
    assert hits(["Answer briefly. what is the capital of Spain , please tell ? Madrid."], [item], similarity=0.95) == []


def test_changed_words_are_a_similar_hit_with_its_similarity_and_text() -> None:
    item = "Which planet of the solar system is the largest one by mass and by volume"
    row = item.replace("planet", "planets").replace("largest", "biggest").replace("volume", "volumes")
    (found,) = hits([row], [item], similarity=0.6)

    def grams(text: str) -> set[str]:
        padded = "\0" * 4 + folded(text) + "\0" * 4
        return {padded[place : place + 5] for place in range(len(padded) - 4)}

    expected = len(grams(row) & grams(item)) / len(grams(row) | grams(item))
    assert found.kind == "similar"
    assert found.similarity == pytest.approx(expected, abs=1e-15)
    assert found.text == "gest one by mass and by volume"


def test_a_template_of_the_benchmark_is_no_hit_and_is_counted() -> None:
    template = "Answer the following multiple choice question and finish with the letter of the right option :"
    items = read_items(
        Text(number, f"{template} question number {number} about {'abcdefghijkl'[number]}") for number in range(12)
    )
    assert items.templates == 5  # 17 equal words hold five runs of 13
    assert list(contaminated([Text(0, f"{template} something that no item asks, in many other words")], items)) == []


def test_overlap_of_two_parts_counts_each_wanted_text_once() -> None:
    train = [Text(0, QUESTION), Text(1, QUESTION.lower()), Text(2, "Say: " + QUESTION), Text(3, "unrelated")]
    test = [Text("a", QUESTION), Text("b", "Never seen before"), Text("c", "")]
    found = overlap(train, test)
    assert (found.wanted, found.exact, found.words, found.similar) == (3, 1, 0, 0)
    assert [hit.row for hit in found.hits] == [0, 1, 2]
    assert found.share == pytest.approx(1 / 3)


def test_the_threshold_is_checked() -> None:
    with pytest.raises(InvalidSpec, match="between 0.4 and 1, got 0.2"):
        read_items([], 0.2)
    assert hits(["a row"], []) == []


@settings(max_examples=50, deadline=None)
@given(
    before=st.text(max_size=20),
    after=st.text(max_size=20),
    words=st.lists(st.sampled_from("abcdefg"), min_size=13, max_size=30),
)
def test_an_item_within_any_surroundings_is_found(before: str, after: str, words: list[str]) -> None:
    item = " ".join(words)
    (found,) = hits([f"{before} {item} {after}"], [item])
    assert found.kind in ("exact", "words")
    assert item in found.text


@pytest.mark.skipif(not REAL_DATA.exists(), reason="the real data is not beside the checkout")
def test_items_of_gsm8k_in_its_own_train_part_are_those_with_a_common_run_of_thirteen_words() -> None:
    def texts(part: str) -> list[str]:
        with (REAL_DATA / "gsm8k" / f"{part}.jsonl").open(encoding="utf-8") as lines:
            return ["{question}\n{answer}".format(**json.loads(line)) for line in lines]

    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[^\W_]+", folded(text))
        return {tuple(words[place : place + 13]) for place in range(len(words) - 12)}

    train, test = texts("train"), texts("test")
    held_by = Counter(run for text in test for run in runs(text))
    of_train = {run for text in train for run in runs(text)}
    expected = [number for number, text in enumerate(test) if any(held_by[run] <= 10 for run in runs(text) & of_train)]
    found = overlap(
        (Text(number, text) for number, text in enumerate(train)), [Text(*item) for item in enumerate(test)]
    )
    assert sorted({hit.item for hit in found.hits if hit.kind == "words"}) == expected
    assert (found.exact, found.words, found.similar) == (0, len(expected), 0)
    assert len(expected) < 0.01 * len(test)
