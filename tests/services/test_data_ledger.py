"""The ledger of a dataset in training: each row has one fate, and a job's is that of its own settings."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from lorasmith.engine.__main__ import STAGES
from lorasmith.engine.data import ledger
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import Conflict
from lorasmith.schemas.data import DataImportSpec, Fate
from lorasmith.schemas.jobs import Event, JobOrder
from lorasmith.services import data_ledger
from lorasmith.services.data import ledger_lines
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_ledger import ledger_of_job, ledger_summary, training_ledger
from lorasmith.services.data_redeciding import split
from lorasmith.services.jobs import Watch
from lorasmith.services.training import build_spec, start_training
from lorasmith.services.workbench import Workbench

LIMITS = {"max_seq_length": 40, "too_long": "right"}


def unwatched(event: Event) -> None:
    pass


@pytest.fixture
def rows(workbench: Workbench, tmp_path: Path) -> str:
    path = tmp_path / "rows.csv"
    texts = [" ".join(["word"] * (1 + 4 * (n % 9))) + f" {n}" for n in range(18)]
    path.write_text("text,label\n" + "".join(f"{text},yes\n" for text in [*texts, texts[0]]), encoding="utf-8")
    return import_dataset(workbench, path, DataImportSpec(name="rows", split=(0.6, 0.2, 0.2), exact=True)).name


@pytest.fixture
def engine_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine in the process of the test: to start one takes longer than all that is tested here."""

    def run_here(folder: Path, order: JobOrder, watch: Watch) -> dict[str, object]:
        assert STAGES[order.kind] == ledger.__name__
        folder.mkdir(parents=True)
        return ledger.run(order, folder, Reporter(folder)).model_dump(mode="json")

    monkeypatch.setattr(data_ledger, "run_preview", run_here)


def test_each_row_has_one_fate_in_training(workbench: Workbench, rows: str, engine_here: None) -> None:
    asked = training_ledger(workbench, rows, {"model": "starter", "training": LIMITS}, unwatched)
    lines = list(asked.lines(ledger_lines(workbench, rows)))
    summary = ledger_summary(workbench, rows, asked)
    assert (summary.rows, summary.fates[Fate.EXACT_DUPLICATE], summary.max_tokens) == (19, 1, 40)
    assert Counter(line.fate for line in lines) == {fate: count for fate, count in summary.fates.items() if count}
    cut = [line for line in lines if line.fate == Fate.CUT]
    dropped = [line for line in lines if line.fate == Fate.DROPPED]
    assert cut
    assert dropped
    assert {line.part for line in cut} == {"train"}
    assert {line.part for line in dropped} == {"val"}  # too long to measure on, whatever the policy
    for line in cut:
        assert line.rendered_tokens - line.cut_tokens == 40  # type: ignore[operator]
        assert line.reason == f"{line.rendered_tokens} tokens, {line.cut_tokens} of them cut"
    assert summary.cut_tokens == sum(line.cut_tokens or 0 for line in cut)


def test_a_job_is_asked_about_with_its_own_settings_and_on_its_own_version(
    workbench: Workbench, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"model": "starter", "training": LIMITS}
    job = start_training(workbench, build_spec({"data": rows, **given}))
    with monkeypatch.context() as patched:
        patched.setattr(data_ledger, "examined", lambda *arguments: arguments)
        asked = training_ledger(workbench, rows, given, unwatched)
        assert ledger_of_job(workbench, rows, job.id, unwatched) == asked
    split(workbench, rows, {"split": (1.0, 0.0, 0.0)})
    with pytest.raises(Conflict, match=rf"{job.id} does not train on rows@[0-9a-f]+ but on rows@[0-9a-f]+"):
        ledger_of_job(workbench, rows, job.id, unwatched)
