"""A dataset made by a review knows the version, the teacher and the review that it comes from."""

from __future__ import annotations

import pytest

from lorasmith.errors import Conflict, NotFound
from lorasmith.schemas.data import Dataset
from lorasmith.services.augmentation_review import Review, apply_review
from lorasmith.services.data_redeciding import dedup
from lorasmith.services.data_removal import remove_dataset
from lorasmith.services.data_replay import replay
from lorasmith.services.data_versions import parents_of
from lorasmith.services.workbench import Workbench
from tests.augmentation_jobs import Augment


@pytest.fixture
def made(workbench: Workbench, augment: Augment) -> Dataset:
    review = Review(workbench, augment(n=2))
    review.decide(["1.1", "3.2"], accepted=True)
    review.decide(["2.1"], accepted=True, text="On Saturday: is the workshop open?")
    return apply_review(workbench, review, "shop-more")


def test_the_chain_names_version_method_teacher_and_review(workbench: Workbench, shop: Dataset, made: Dataset) -> None:
    assert [step.operation for step in made.lineage] == ["import", "augment"]
    assert made.lineage[0] == shop.lineage[0]
    step = made.lineage[1]
    assert [(one.kind, one.id) for one in step.inputs] == [("dataset", shop.id), ("review", step.spec["job"])]
    assert step.inputs[0].sha256 == shop.sha256
    assert step.inputs[1].sha256 == made.source_sha256
    said = {key: step.spec[key] for key in ("method", "teacher", "host", "accepted", "edited")}
    assert said == {"method": "rephrase", "teacher": "stub-model", "host": "127.0.0.1", "accepted": 3, "edited": 1}
    assert len(step.spec["accepted_by"]) == 1
    assert step.sha256 == made.sha256
    assert [one.id for one in parents_of(made)] == [shop.id]


def test_the_version_that_it_was_made_from_is_not_removed(workbench: Workbench, shop: Dataset, made: Dataset) -> None:
    with pytest.raises(Conflict, match=f"used by job shop-rephrase, dataset {made.reference}"):
        remove_dataset(workbench, "shop")


def test_a_replay_takes_the_answers_as_recorded_and_says_so(workbench: Workbench, made: Dataset) -> None:
    decided = dedup(workbench, "shop-more", 0.4).after
    again = replay(workbench, decided.name)
    assert again.equal
    assert [step.operation for step in again.steps] == ["import", "augment", "dedup"]
    rows = made.lineage[1].inputs[1].name
    note = f"3 accepted texts of stub-model are taken as recorded in {rows}; no teacher is asked again"
    assert [step.note for step in again.steps] == [None, note, None]

    path = workbench.path(rows)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("On Saturday: is", "On Sunday: is"), encoding="utf-8")
    changed = replay(workbench, "shop-more").steps[1]
    assert not changed.equal
    assert (changed.difference or "").startswith("the accepted texts changed: their sha256 was ")
    path.unlink()
    with pytest.raises(NotFound, match="the accepted texts of job_.* are not there"):
        replay(workbench, "shop-more")


def test_pairs_are_replayed_without_the_rows_that_they_were_made_from(workbench: Workbench, augment: Augment) -> None:
    review = Review(workbench, augment(method="negative"))
    review.accept_all(0.0)
    apply_review(workbench, review, "pairs")
    assert apply_review(workbench, review, "pairs").lineage[-1].operation == "augment"
    assert replay(workbench, "pairs").equal
