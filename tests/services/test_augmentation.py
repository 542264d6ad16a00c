"""Candidates are judged before a person sees them, and nothing enters a dataset that nobody has accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import Conflict, InvalidData, InvalidSpec, NotFound
from lorasmith.schemas.augmentation import AugmentationMethod, AugmentationSpec
from lorasmith.schemas.data import DataImportSpec, Dataset, Example
from lorasmith.schemas.jobs import JobStatus
from lorasmith.schemas.teachers import Reach
from lorasmith.services.augmentation import order_of, resume_augmentation, start_augmentation
from lorasmith.services.augmentation_candidates import greatest_similarity
from lorasmith.services.augmentation_review import Review, apply_review
from lorasmith.services.data import read_examples
from lorasmith.services.data_duplicates.leaks import find_leakage
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_removal import remove_dataset
from lorasmith.services.workbench import Workbench
from tests.augmentation_jobs import LOCAL, QUESTIONS, Augment, question_of, run_job
from tests.teacher_stub import Reply, Stub


def train_of(workbench: Workbench, dataset: Dataset) -> list[Example]:
    return list(read_examples(workbench, dataset, "train"))


OIL, OPEN, HELMET = QUESTIONS["train"]
GOOD = "When it is cold outside, after how many kilometres does a chain need new oil?"


JUDGED = [  # text, reason and sentence; of one row, so that no text may be like an earlier one
    (GOOD, None, None),
    (OIL.upper().replace(" ", "  "), "identical", "it says what its source says"),
    (OPEN, "identical", "another row of train asks the same"),
    (OIL + " Please.", "too-similar", "similarity 0.68, expected below 0.6"),  # 13 of 19 padded 3-grams
    ("Oil?", "too-short", f"4 characters for {len(OIL)} of its source"),
    ("chain " * 80, "too-long", f"479 characters for {len(OIL)} of its source"),
    ("Does the chain\x1b[2J of a bike need oil in January?", "broken-text", "it holds U+001B at character 15"),
    ("Wie oft muss ich die Kette meines Fahrrads im Winter ölen?", "wrong-language", "it is in de, its source in en"),
    (
        "Tell me, which inner tube fits a tyre of the size 700x32?",
        "leaks",
        "it asks what row 4 asks, which is held out",
    ),
]


def test_a_candidate_is_held_against_its_source_and_all_other_rows(workbench: Workbench, augment: Augment) -> None:
    job = augment({OIL: [text for text, _, _ in JUDGED]}, max_rows=1, n=len(JUDGED), max_similarity=0.6)
    items = Review(workbench, job).items()
    assert [item.candidate.id for item in items] == [f"1.{number}" for number in range(1, 10)]
    assert [(item.candidate.reason, item.candidate.sentence) for item in items] == [
        (why, said) for _, why, said in JUDGED
    ]
    assert [item.state for item in items] == ["pending"] + 8 * ["rejected"]


def test_a_text_that_comes_twice_counts_once(workbench: Workbench, augment: Augment) -> None:
    """Within a row, and from a teacher that gives every row the same."""
    job = augment({OIL: [GOOD, GOOD + "!", GOOD], OPEN: [GOOD], HELMET: [GOOD]}, n=3, max_similarity=0.7)
    found = {item.candidate.id: item.candidate.reason for item in Review(workbench, job).items()}
    assert found == {
        "1.1": None,
        "1.2": "too-similar",
        "1.3": "says-it-twice",
        "2.1": "says-it-twice",
        "3.1": "says-it-twice",
    }


def test_similarity_is_jaccard_of_padded_word_trigrams() -> None:
    """By hand: 'a b c' and 'a b d' have 5 padded 3-grams each, of which (_, _, a) and (_, a, b) are shared: 2 of 8."""
    assert greatest_similarity("a b c", ["a b d"]) == pytest.approx(2 / 8)
    assert greatest_similarity("a b c", ["x y z", "a b c"]) == 1.0


def test_a_job_says_what_it_was_asked_and_where_the_candidates_come_from(
    workbench: Workbench, augment: Augment, shop: Dataset, stub: Stub
) -> None:
    job = augment()
    assert job.status is JobStatus.COMPLETED
    assert job.name == "shop-rephrase"
    assert order_of(workbench, job).inputs["dataset_sha256"] == shop.sha256
    made_by = Review(workbench, job).items()[0].candidate.made_by
    assert (made_by.method, made_by.teacher, made_by.host) == ("rephrase", "stub-model", "127.0.0.1")
    assert (made_by.prompt, made_by.job) == ("rephrase@1", job.id)
    assert made_by.source == train_of(workbench, shop)[0].id


def test_decisions_are_kept_and_a_later_one_counts(workbench: Workbench, augment: Augment) -> None:
    job = augment(
        {OIL: [GOOD], OPEN: [OIL], HELMET: ["May I bring back headgear that was on my head one single time?"]}
    )
    review = Review(workbench, job)
    review.decide(["1.1"], accepted=True)
    review.decide(["1.1", "3.1"], accepted=False)
    review.decide(["2.1"], accepted=True)  # a reviewer overrules a check
    review.decide(["3.1"], accepted=True, text="May I bring it back?")
    with review.path.open("ab") as torn:
        torn.write(b'{"candidate": "1.1", "acc')
    again = Review(workbench, job)
    assert {item.candidate.id: item.state for item in again.items()} == {
        "1.1": "rejected",
        "2.1": "accepted",
        "3.1": "accepted",
    }
    assert again.items()[2].text == "May I bring it back?"
    assert again.decisions["3.1"].by
    assert again.counts() == {"accepted": 2, "rejected": 1}
    again.decide(["1.1"], accepted=True)  # cuts the torn line off
    assert Review(workbench, job).counts() == {"accepted": 3}


def test_accepting_all_goes_by_novelty(workbench: Workbench, augment: Augment) -> None:
    job = augment({OIL: [GOOD, OIL + " Thank you very much for it."], OPEN: ["x"], HELMET: [HELMET]}, n=2)
    review = Review(workbench, job)
    near = review.candidates["1.2"]
    assert near.score == pytest.approx(1 - near.similarity)
    assert review.accept_all(near.score + 0.01) == 1
    assert review.accept_all(0.0) == 1
    assert review.counts() == {"accepted": 2, "rejected as identical": 1, "rejected as too-short": 1}


def test_a_candidate_that_is_not_there_is_named(workbench: Workbench, augment: Augment) -> None:
    review = Review(workbench, augment())
    with pytest.raises(NotFound, match=r"no candidate '7\.1' in job_"):
        review.decide(["1.1", "7.1"], accepted=True)
    with pytest.raises(InvalidSpec, match="must not be empty"):
        review.decide(["1.1"], accepted=True, text=" ")
    assert review.decisions == {}


def test_accepted_rows_join_train_in_the_group_of_their_source(
    workbench: Workbench, augment: Augment, shop: Dataset
) -> None:
    job = augment(n=2)
    review = Review(workbench, job)
    review.decide(["1.1", "1.2", "3.2"], accepted=True)
    review.decide(["2.1"], accepted=False)
    made = apply_review(workbench, review, "shop-more")
    assert made.part_sizes == {"train": 6, "val": 1, "test": 1}
    sources = {one.id: one for one in train_of(workbench, shop)}
    added = [one for one in train_of(workbench, made) if one.made_by]
    assert [one.made_by.source for one in added if one.made_by] == [
        review.candidates[one].example_id for one in ("1.1", "1.2", "3.2")
    ]
    for one in added:
        assert one.made_by is not None
        source = sources[one.made_by.source]
        assert one.group == source.group
        assert one.messages is not None
        assert source.messages is not None
        assert one.messages[:3] == source.messages[:3]
        assert one.messages[4:] == source.messages[4:]
        assert one.messages[3].content.startswith("In other words")
        assert (one.made_by.accepted_by, one.made_by.edited) == (review.decisions["1.1"].by, None)
    parts: tuple[Any, ...] = ("val", "test")
    for part in parts:
        assert [one.content() for one in read_examples(workbench, made, part)] == [
            one.content() for one in read_examples(workbench, shop, part)
        ]
    assert [(report.held, report.part) for report in find_leakage(workbench, "shop-more")] == [
        (0, "train"),
        (0, "train"),
    ]
    assert made.statistics["made_by"] == {"rephrase by stub-model at 127.0.0.1": 3}


def test_one_review_makes_one_dataset_and_other_decisions_another(workbench: Workbench, augment: Augment) -> None:
    review = Review(workbench, augment())
    with pytest.raises(InvalidData, match="nothing of job_.* is accepted"):
        apply_review(workbench, review, "more")
    review.decide(["1.1"], accepted=True)
    first = apply_review(workbench, review, "more")
    assert apply_review(workbench, review, "more").id == first.id
    review.decide(["2.1"], accepted=True)
    with pytest.raises(Conflict, match="there is already a dataset 'more'"):
        apply_review(workbench, review, "more")
    assert apply_review(workbench, review, "even-more").num_examples == first.num_examples + 1
    assert Path(first.source).is_file()


def test_an_edit_is_marked_as_one(workbench: Workbench, augment: Augment) -> None:
    review = Review(workbench, augment())
    review.decide(["1.1"], accepted=True, text="Chain oil in winter: how often?")
    made = apply_review(workbench, review, "edited")
    (one,) = [one for one in train_of(workbench, made) if one.made_by]
    assert one.messages is not None
    assert one.made_by is not None
    assert one.messages[3].content == "Chain oil in winter: how often?"
    assert one.made_by.edited is True


def test_reasoning_stands_before_an_answer_that_stays_as_it_is(
    workbench: Workbench, augment: Augment, shop: Dataset
) -> None:
    review = Review(workbench, augment(method="expand"))
    review.accept_all(0.0)
    made = apply_review(workbench, review, "reasoned")
    answers = {one.id: one.answer() for one in train_of(workbench, shop)}
    added = [one for one in train_of(workbench, made) if one.made_by]
    assert len(added) == 3
    for one in added:
        assert one.made_by is not None
        reasoning, _, answer = one.answer().partition("\n\n")
        assert reasoning.startswith("Step 1")
        assert answer == answers[one.made_by.source]


def test_wrong_answers_become_preferences(workbench: Workbench, augment: Augment, shop: Dataset) -> None:
    review = Review(workbench, augment(method="negative", n=2))
    review.decide(["1.1", "1.2", "2.2"], accepted=True)
    made = apply_review(workbench, review, "pairs")
    assert made.kind == "preference"
    assert made.part_sizes == {"train": 3, "val": 0, "test": 0}
    pairs = train_of(workbench, made)
    source = train_of(workbench, shop)[0]
    assert source.messages is not None
    assert [one.group for one in pairs] == [source.group, source.group, "topic of train 1"]
    assert pairs[0].messages == source.messages[:-1]
    assert pairs[0].chosen == source.messages[-1:]
    assert [one.content for one in pairs[0].rejected or []] == ["Sorry, the shop has been closed since 1990."]
    with pytest.raises(InvalidData, match="holds rows of format preference, expected requests with one answer"):
        spec = review.spec.model_copy(update={"data": "pairs"})
        start_augmentation(workbench, spec, LOCAL)


def test_a_resumed_job_adds_candidates_and_leaves_those_that_were_judged(
    workbench: Workbench, augment: Augment, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.rule = lambda request, before: Reply(500, b"") if question_of(request) == OPEN and before == 0 else None
    job = augment()
    assert job.result is not None
    assert job.result["rows"] == {"answered": 2, "rejected": 0, "failed": 1, "skipped": 0}
    review = Review(workbench, job)
    review.decide(["1.1"], accepted=True)
    path = review.path.with_name("candidates.jsonl")
    before = path.read_text(encoding="utf-8")
    run_job(workbench, job)
    again = Review(workbench, job)
    assert path.read_text(encoding="utf-8").startswith(before)
    assert [item.candidate.id for item in again.items()] == ["1.1", "2.1", "3.1"]
    assert again.counts() == {"accepted": 1, "pending": 2}


def test_a_completed_job_goes_on_only_where_rows_have_failed(workbench: Workbench, augment: Augment) -> None:
    job = augment()
    with pytest.raises(Conflict, match="is completed, there is nothing left to do"):
        resume_augmentation(workbench, job.id, lambda event: None)


def test_a_review_needs_its_source(workbench: Workbench, augment: Augment, shop: Dataset) -> None:
    job = augment()
    with pytest.raises(Conflict, match="is used by job shop-rephrase"):
        remove_dataset(workbench, shop.id)
    remove_dataset(workbench, shop.id, force=True)
    with pytest.raises(NotFound, match="the dataset 'shop' .*, which the job augments, is removed"):
        Review(workbench, job)


def test_a_row_says_who_made_it_and_a_field_of_that_name_may_be_the_users_own(
    workbench: Workbench, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    own = {"input": "a?", "output": "b", "made_by": "Ann"}
    file.write_text(json.dumps(own) + "\n" + json.dumps({**own, "input": "c?"}) + "\n", encoding="utf-8")
    assert import_dataset(workbench, file, DataImportSpec(name="own")).statistics.get("made_by") is None
    file.write_text(json.dumps({**own, "made_by": {"method": "rephrase"}}) + "\n", encoding="utf-8")
    with pytest.raises(
        InvalidData, match="field `made_by`: found .*, expected an object as `data review --apply` writes"
    ):
        import_dataset(workbench, file, DataImportSpec(name="broken"))


def test_what_cannot_work_is_refused_before_there_is_a_job(
    workbench: Workbench, shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = {"endpoint": "http://127.0.0.1:9/v1", "model": "m"}
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)

    def start(of_teacher: dict[str, Any] | None = None, reach: Reach = LOCAL, **fields: Any) -> None:
        values = {"data": "shop", "method": "rephrase", "teacher": {**teacher, **(of_teacher or {})}, **fields}
        start_augmentation(workbench, AugmentationSpec.model_validate(values), reach)

    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a plain text"}\n{"text": "another one"}\n', encoding="utf-8")
    import_dataset(workbench, texts, DataImportSpec(name="texts"))
    with pytest.raises(InvalidData, match="holds plain texts"):
        start(data="texts")
    with pytest.raises(NotFound, match="no dataset and no file 'shp'; did you mean 'shop'"):
        start(data="shp")
    with pytest.raises(InvalidSpec, match="NO_SUCH_KEY, which should hold the key, is not set"):
        start({"api_key_env": "NO_SUCH_KEY"})
    with pytest.raises(InvalidSpec, match="an address of a private network"):
        start({"endpoint": "http://10.1.2.3/v1"})
    with pytest.raises(InvalidSpec, match="this machine itself"):
        start(reach=Reach())
    with pytest.raises(Conflict, match="already a dataset named 'texts'"):
        start(name="texts")
    with pytest.raises(ValueError, match="a language belongs to back-translate"):
        start(language="fr")
    assert workbench.jobs.list() == []
    assert AugmentationMethod.BACK_TRANSLATE.rewords
