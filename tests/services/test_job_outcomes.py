"""What a finished job leaves in the store, also where a crash came between its folder and its row."""

from __future__ import annotations

import pytest

from lorasmith.schemas.evaluation import Evaluation
from lorasmith.schemas.jobs import Job, JobKind
from lorasmith.services.job_outcomes import keep_evaluation
from lorasmith.services.jobs import create_job
from lorasmith.services.workbench import Workbench


@pytest.fixture
def job(workbench: Workbench) -> Job:
    return create_job(workbench, JobKind.EVALUATION, "adder", {}, {})


@pytest.fixture
def evaluation(workbench: Workbench, job: Job) -> Evaluation:
    made = Evaluation(
        id="evaluation_1",
        name="adder",
        adapter="adder",
        model="starter",
        dataset="sums",
        part="test",
        conditions=[],
        comparisons=[],
        peak_memory_bytes=1,
        settings={},
        folder="evaluation",
    )
    folder = workbench.path(job.folder) / made.folder
    folder.mkdir()
    (folder / "evaluation.json").write_text(made.model_dump_json(), encoding="utf-8")
    return made


def test_an_evaluation_whose_row_a_crash_prevented_is_kept_in_the_next_try(
    workbench: Workbench, job: Job, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(workbench.evaluations, "add", ended)
        keep_evaluation(workbench, job, evaluation)
    assert workbench.evaluations.list() == []
    kept = keep_evaluation(workbench, job, evaluation)
    assert workbench.evaluations.list() == [kept]
    assert (workbench.path(kept.folder) / "evaluation.json").is_file()
    assert keep_evaluation(workbench, job, evaluation) == kept


def ended(_: Evaluation) -> None:
    raise KeyboardInterrupt
