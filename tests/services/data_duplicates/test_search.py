import itertools
import json
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorasmith.errors import Conflict, InvalidData, InvalidSpec, NotFound
from lorasmith.services.data_duplicates import search
from lorasmith.services.data_duplicates.index import Index, open_index, write_index
from lorasmith.services.data_duplicates.search import Decision, Finding, decide
from lorasmith.services.data_duplicates.shingles import Shingling
from lorasmith.services.data_duplicates.signatures import candidate_probability, lowest_threshold, rows_per_band
from lorasmith.services.data_duplicates.texts import Row, folded

TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")


@cache
def shingle_set(text: str, size: int = 3) -> set[tuple[str, ...]]:
    """The definition, with strings and without hashes."""
    tokens = TOKEN.findall(folded(text))
    padded = [""] * (size - 1) + tokens + [""] * (size - 1)
    return {tuple(padded[place : place + size]) for place in range(len(tokens) + size - 1)} if tokens else set()


def similarity(left: str, right: str) -> float:
    one, other = shingle_set(left), shingle_set(right)
    return len(one & other) / len(one | other) if one and other else 0.0


def brute_force_clusters(texts: Sequence[str], threshold: float) -> set[frozenset[int]]:
    """Connected components of the graph of all pairs at or above the threshold, and of equal texts."""
    parent = list(range(len(texts)))

    def root(place: int) -> int:
        while parent[place] != place:
            place = parent[place]
        return place

    for left, right in itertools.combinations(range(len(texts)), 2):
        equal = folded(texts[left]) == folded(texts[right])
        if equal or similarity(texts[left], texts[right]) >= threshold:
            parent[root(right)] = root(left)
    members: dict[int, set[int]] = {}
    for place in range(len(texts)):
        members.setdefault(root(place), set()).add(place)
    return set(map(frozenset, members.values()))


def clusters(findings: Iterable[Finding]) -> set[frozenset[int]]:
    members: dict[int, set[int]] = {}
    for finding in findings:
        members.setdefault(finding.id if finding.of is None else finding.of, set()).add(finding.id)
    return set(map(frozenset, members.values()))


def indexed(texts: Iterable[str], folder: Path, **options: object) -> Index:
    rows = (Row(number, text) for number, text in enumerate(texts))
    return write_index(rows, folder, replace=True, processes=1, **options)  # type: ignore[arg-type]


def edited_texts(seed: int, count: int, originals: int = 40) -> list[str]:
    """Texts of 5 to 40 words, most of them edits of a few originals: pairs at every similarity."""
    generator = np.random.default_rng(seed)
    vocabulary = ["".join(generator.choice(list("abcdefghij"), 4)) for _ in range(300)]
    bases = [generator.choice(vocabulary, generator.integers(5, 40)).tolist() for _ in range(originals)]
    texts = []
    for _ in range(count):
        words = list(bases[generator.integers(originals)])
        for _ in range(generator.integers(0, 5)):
            words[generator.integers(len(words))] = str(generator.choice(vocabulary))
        texts.append(" ".join(words))
    return texts


@pytest.mark.parametrize("threshold", [0.5, 0.65, 0.8, 0.9, 1.0])
def test_clusters_are_those_of_all_pairs_at_or_above_the_threshold(tmp_path: Path, threshold: float) -> None:
    texts = edited_texts(seed=5, count=250)
    decision = decide(indexed(texts, tmp_path / "index"), threshold)
    # each pair at the threshold may be missed with a probability of 0.01; this seed has no miss
    assert clusters(decision.findings()) == brute_force_clusters(texts, threshold)
    for finding in decision.findings():
        if finding.of is not None:
            assert finding.similarity == pytest.approx(similarity(texts[finding.id], texts[finding.of]), abs=1e-15)
        if finding.kind == "near":
            assert finding.of is not None
            through = finding.of if finding.via is None else finding.via
            assert similarity(texts[finding.id], texts[through]) >= threshold
    assert decision.summary().uncompared_pairs == 0


words = st.sampled_from(["alpha", "beta", "gamma", "delta", "1", "2", "+", "-", "東京", "ﬁx", "ÅNGSTRÖM", "ǆ"])
some_texts = st.lists(st.lists(words, max_size=9).map(" ".join), max_size=12)


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(texts=some_texts, data=st.data())
def test_the_order_of_the_rows_decides_only_between_equally_long_rows(
    tmp_path: Path, texts: list[str], data: st.DataObject
) -> None:
    rows = [Row(number, text, "") for number, text in enumerate(texts)]
    shuffled = data.draw(st.permutations(rows))
    first = list(decide(write_index(rows, tmp_path / "first", replace=True, processes=1)).findings())
    second = list(decide(write_index(shuffled, tmp_path / "second", replace=True, processes=1)).findings())
    assert [finding.id for finding in second] == [row.id for row in shuffled]
    assert clusters(first) == clusters(second)
    assert sum(map(len, clusters(first))) == len(rows)  # a partition
    for members in clusters(first):
        (kept,) = [finding.id for finding in first if finding.id in members and finding.kind == "kept"]
        longest = max(len(folded(texts[member])) for member in members)
        assert kept == min(member for member in members if len(folded(texts[member])) == longest)


def test_another_threshold_is_decided_without_the_rows_as_a_fresh_search_would(tmp_path: Path) -> None:
    texts = edited_texts(seed=6, count=300)
    indexed(texts, tmp_path / "kept")
    for threshold in (0.8, 0.9, 0.55, 0.7, 0.8):
        again = decide(open_index(tmp_path / "kept"), threshold)
        fresh = decide(indexed(texts, tmp_path / "fresh"), threshold)
        assert list(again.findings()) == list(fresh.findings())


def test_the_number_of_processes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.services.data_duplicates.parallel.TASKS_BEFORE_PROCESSES", 2)
    monkeypatch.setattr("lorasmith.services.data_duplicates.index.ROWS_AT_ONCE", 100)
    monkeypatch.setattr(search, "FEW_ROWS", 10)
    rows = [Row(number, text) for number, text in enumerate(edited_texts(seed=7, count=800, originals=100))]
    found = []
    for processes in (1, 2):
        index = write_index(rows, tmp_path / str(processes), processes=processes)
        found.append((list(decide(index, processes=processes).findings()), index.signatures.tobytes()))
    assert found[0] == found[1]


def test_recall_at_the_threshold_is_what_the_formula_says(tmp_path: Path) -> None:
    """2,000 pairs of disjoint vocabulary with a Jaccard of exactly 0.8, by the signatures alone."""
    texts = []
    for pair in range(2000):
        shared = [f"p{pair}w{number}" for number in range(46)]  # 48 shingles
        texts += [" ".join(shared), " ".join([*shared[:-3], "x", "y", "z"])]
    expected = similarity(texts[0], texts[1])
    assert 0.8 <= expected < 0.83  # 43 shared shingles of 53
    decision = decide(indexed(texts, tmp_path / "index"), 0.8)
    joined = sum(decision.of[2 * pair] == decision.of[2 * pair + 1] for pair in range(2000))
    probability = candidate_probability(expected, 8)
    assert joined / 2000 >= probability - 4 * (probability * (1 - probability) / 2000) ** 0.5  # four standard errors


def test_bandings_reach_the_promised_recall() -> None:
    assert candidate_probability(0.8, 8) == pytest.approx(1 - (1 - 0.8**8) ** 32)
    for hundredths in range(40, 101):
        assert candidate_probability(hundredths / 100, rows_per_band(hundredths / 100)) >= 0.99
    assert rows_per_band(0.8) == 8
    assert lowest_threshold(8) == 0.78
    for threshold in (0.39, 1.01, 0.0):
        with pytest.raises(InvalidSpec, match=r"must be between 0.4 and 1, got"):
            rows_per_band(threshold)


def kinds(decision: Decision) -> list[str]:
    return [finding.kind for finding in decision.findings()]


LONG = "the quick brown fox jumps over the lazy dog and then it sleeps in the warm sun for a while"


def test_equal_texts_are_exact_duplicates_whatever_their_case_form_and_blanks(tmp_path: Path) -> None:
    texts = ["ﬁnal  STRASSE\n", "final straße", "Final\tStrasse", "finale strasse"]
    found = list(decide(indexed(texts, tmp_path / "index"), None).findings())
    assert found == [Finding(0, "kept"), Finding(1, "exact", 0, 1.0), Finding(2, "exact", 0, 1.0), Finding(3, "kept")]


def test_one_instruction_with_different_answers_is_a_group(tmp_path: Path) -> None:
    rows = [
        Row(10, "Name a colour.", "Red is the colour of fire and of ripe tomatoes."),
        Row(11, "name a  colour.", "Blue is the colour of a clear sky at noon in summer."),
        Row(12, "Name a colour.", "red is the colour of fire and of ripe tomatoes."),
        Row(13, "Name a number.", "Seven"),
    ]
    found = list(decide(write_index(rows, tmp_path / "index")).findings())
    assert found == [
        Finding(10, "kept", group=10),
        Finding(11, "kept", group=10),
        Finding(12, "exact", 10, 1.0),
        Finding(13, "kept"),
    ]


def test_a_long_text_with_another_label_is_no_duplicate(tmp_path: Path) -> None:
    rows = [Row(0, LONG, "positive"), Row(1, LONG + " again", "negative"), Row(2, LONG + " again", "positive")]
    found = list(decide(write_index(rows, tmp_path / "index")).findings())
    assert [(finding.id, finding.kind, finding.of) for finding in found] == [
        (0, "near", 2),
        (1, "kept", None),
        (2, "kept", None),
    ]


def test_a_reworded_answer_to_one_instruction_is_a_near_duplicate(tmp_path: Path) -> None:
    rows = [Row(0, "Tell me a story.", LONG), Row(1, "Tell me a story.", LONG + " longer")]
    assert kinds(decide(write_index(rows, tmp_path / "index"))) == ["near", "kept"]
    rows = [
        Row(0, LONG, "one two three four five six seven eight"),
        Row(1, LONG, "one two three four five six seven nine"),
    ]
    assert similarity(" ".join(rows[0][1:]), " ".join(rows[1][1:])) > 0.75  # the instruction alone brings that
    assert kinds(decide(write_index(rows, tmp_path / "other"), 0.75)) == ["kept", "kept"]


def test_with_instructions_compared_all_answers_of_the_kept_one_stay(tmp_path: Path) -> None:
    rows = [Row(0, LONG, "yes"), Row(1, LONG, "no"), Row(2, LONG, "YES"), Row(3, LONG + " too", "perhaps")]
    found = list(decide(write_index(rows, tmp_path / "index", key="instruction")).findings())
    assert [(finding.kind, finding.of) for finding in found] == [("near", 3), ("near", 3), ("near", 3), ("kept", None)]
    found = list(decide(write_index(rows[:3], tmp_path / "same", key="instruction")).findings())
    assert [(finding.kind, finding.of, finding.group) for finding in found] == [
        ("kept", None, 0),
        ("kept", None, 0),
        ("exact", 0, None),
    ]


def test_with_answers_compared_the_instructions_do_not_count(tmp_path: Path) -> None:
    rows = [Row(0, "a", LONG), Row(1, "b", LONG.upper()), Row(2, "c", LONG + " longer")]
    assert kinds(decide(write_index(rows, tmp_path / "index", key="answer"))) == ["near", "near", "kept"]


def test_a_chain_is_one_cluster_and_says_through_which_row(tmp_path: Path) -> None:
    tokens = [f"w{number}" for number in range(60)]
    chain = [" ".join([f"x{number}" for number in range(step * 3)] + tokens[step * 3 :]) for step in range(4)]
    found = list(decide(indexed(chain, tmp_path / "index"), 0.8).findings())
    assert clusters(found) == {frozenset(range(4))}
    far = [finding for finding in found if finding.similarity is not None and finding.similarity < 0.8]
    assert far
    assert all(finding.via is not None for finding in far)


def test_empty_texts_and_odd_characters(tmp_path: Path) -> None:
    texts = [
        "",
        "  \n ",
        "\ud800 half a pair",
        "\ud800 HALF a pair",
        "\u200b",
        "!",
        "。",
        "東京都は日本の首都です",
        "a\x00b",
    ]
    found = list(decide(indexed(texts, tmp_path / "index")).findings())
    assert clusters(found) == {frozenset(members) for members in ((0, 1), (2, 3), (4,), (5,), (6,), (7,), (8,))}
    assert found[1] == Finding(1, "exact", 0, 1.0)
    assert found[3] == Finding(3, "exact", 2, 1.0)
    assert kinds(decide(indexed([], tmp_path / "none"))) == []


def test_scripts_without_spaces_have_shingles(tmp_path: Path) -> None:
    text = "東京都は日本の首都であり世界でも有数の大都市です"
    assert kinds(decide(indexed([text, text + "ね", "大阪は西の町"], tmp_path / "index"))) == ["near", "kept", "kept"]


def test_a_hundred_thousand_equal_rows_are_one_cluster(tmp_path: Path) -> None:
    rows = (Row(number, "the same text in every single row") for number in range(100_000))
    summary = decide(write_index(rows, tmp_path / "index", processes=1)).summary()
    assert (summary.kept, summary.exact, summary.near) == (1, 99_999, 0)


def test_thousands_of_nearly_equal_rows_are_one_cluster(tmp_path: Path) -> None:
    """All 12.5 million pairs are similar; each row is compared about once."""
    texts = [f"{LONG} {LONG[::-1]} {number}" for number in range(5000)]
    summary = decide(indexed(texts, tmp_path / "index")).summary()
    assert (summary.kept, summary.near, summary.uncompared_pairs) == (1, 4999, 0)


def test_a_shared_template_makes_no_duplicates_and_hides_none(tmp_path: Path) -> None:
    """3,000 rows, two thirds of which is a template: half of them share a bucket in some band. 200 are real copies."""
    template = " ".join(f"t{number}" for number in range(40))
    texts = [template + " " + " ".join(f"r{row}w{number}" for number in range(9)) for row in range(3000)]
    texts += [text + " too" for text in texts[:200]]
    assert 0.6 < similarity(texts[0], texts[1]) < 0.7
    decision = decide(indexed(texts, tmp_path / "index"))
    assert clusters(decision.findings()) == {
        *(frozenset((row, 3000 + row)) for row in range(200)),
        *(frozenset((row,)) for row in range(200, 3000)),
    }
    assert decision.summary().uncompared_pairs == 0


def test_what_was_not_compared_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "COMPARISONS_IN_CROWDS", 10)
    texts = [f"{LONG} {LONG[::-1]} {number}" for number in range(100)]
    assert decide(indexed(texts, tmp_path / "index")).summary().uncompared_pairs > 0


def test_characters_as_shingles(tmp_path: Path) -> None:
    texts = ["internationalisation", "internationalisations", "localisation"]
    index = indexed(texts, tmp_path / "index", shingling=Shingling("character", 5))
    assert index.shingles.lengths().tolist() == [23, 24, 16]  # `ation` is twice in the first two
    assert [finding.kind for finding in decide(index, 0.65).findings()] == ["near", "kept", "kept"]


def test_what_cannot_be_searched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="row id 4 is there 2 times"):
        write_index([Row(4, "a"), Row(4, "b")], tmp_path / "index")
    assert not (tmp_path / "index").exists()
    with pytest.raises(InvalidSpec, match="one of whole, instruction, answer, got 'prompt'"):
        write_index([], tmp_path / "index", key="prompt")  # type: ignore[arg-type]
    with pytest.raises(InvalidSpec, match="between 1 and 32 tokens, got 0"):
        Shingling("word", 0)
    with pytest.raises(NotFound):
        open_index(tmp_path / "nothing")
    indexed(["a"], tmp_path / "index")
    with pytest.raises(Conflict):
        write_index([], tmp_path / "index")


def test_a_damaged_or_foreign_index_is_refused(tmp_path: Path) -> None:
    folder = indexed(["a b c", "d e f"], tmp_path / "index").folder
    (folder / "shingles").write_bytes(b"")
    with pytest.raises(InvalidData, match="should hold 80 bytes, found 0"):
        open_index(folder)
    description = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**description, "version": 0}))
    with pytest.raises(InvalidData, match="version 0, this program reads version 1"):
        open_index(folder)
