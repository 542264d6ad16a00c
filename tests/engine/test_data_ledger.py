"""The ledger of a run is what the run does: held against its events, and row for row against the label X-ray."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lorasmith.engine.data import labels, ledger, token_chunks
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import LorasmithError
from lorasmith.schemas.data import Fate
from lorasmith.schemas.data_ledger import TrainedRows
from lorasmith.schemas.jobs import JobKind, JobOrder
from lorasmith.schemas.labels import LabelReport
from tests.engine.chat_templates import conversation
from tests.engine.small_jobs import counting_examples, events, run_engine, write_examples


def asked(tmp_path: Path, model: Path, train: Path, val: Path | None = None, **spec: object) -> TrainedRows:
    folder = tmp_path / "ledger"
    folder.mkdir(exist_ok=True)
    inputs = {
        "model_folder": str(model),
        "train_file": str(train),
        "val_file": str(val) if val else None,
        "tokens_folder": str(tmp_path / "tokens"),
    }
    order = JobOrder(id="job_1", kind=JobKind.LEDGER, spec={"model": "tiny", **spec}, inputs=inputs)
    return ledger.run(order, folder, Reporter(folder))


def x_ray(tmp_path: Path, model: Path, train: Path, **spec: object) -> LabelReport:
    folder = tmp_path / "labels"
    folder.mkdir(exist_ok=True)
    inputs = {"model_folder": str(model), "examples_file": str(train)}
    asked = {"model": "tiny", "data": "counting", **spec}
    return labels.run(JobOrder(id="job_2", kind=JobKind.LABELS, spec=asked, inputs=inputs), folder, Reporter(folder))


@pytest.mark.parametrize("policy", ["right", "left", "split", "drop"])
def test_what_the_ledger_says_is_what_the_run_counts(
    training_job: Callable[..., Path],
    qwen2_folder: Path,
    tmp_path: Path,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = training_job(qwen2_folder, max_steps=1, max_seq_length=34, too_long=policy)
    order = json.loads((folder / "job.json").read_text())
    train, val = Path(order["inputs"]["train_file"]), Path(order["inputs"]["val_file"])
    turns = [("user", "Count."), ("assistant", "1, 2"), ("user", "On."), ("assistant", "3, 4")]
    write_examples(train, [*counting_examples(24), conversation(*turns, row=25)])
    found = asked(tmp_path, qwen2_folder, train, val, max_seq_length=34, too_long=policy)
    assert found.stops is None
    rows = found.parts["train"]

    order["inputs"]["tokens_folder"] = str(tmp_path / "tokens")
    (folder / "job.json").write_text(json.dumps(order))
    monkeypatch.setattr(token_chunks, "draft_all", None)  # the run reads the tokens that the ledger left
    run_engine(folder)
    (reported,) = events(folder, "rows")
    assert reported["cut"] == sum(row.cut_tokens > 0 for row in rows)
    assert reported["cut_tokens"] == sum(row.cut_tokens for row in rows)
    assert reported["split"] == sum(row.fate == Fate.SPLIT for row in rows)
    assert reported["dropped"] == sum(row.fate == Fate.DROPPED for row in rows)
    assert reported["validation_dropped"] == len(found.parts["val"])
    assert reported["train"] == 25 - len(rows) + sum(row.examples for row in rows)
    assert reported["cut"] + reported["split"] + reported["dropped"] > 0

    shown = {
        row.row: (row.fate, row.examples[0].total, sum(piece.cut for piece in row.examples))
        for row in x_ray(tmp_path, qwen2_folder, train, max_seq_length=34, too_long=policy, n=25).rows
        if row.fate != "kept"
    }
    assert list(shown) == [row.row for row in rows]
    for row in rows:
        fate, tokens, cut = shown[row.row]
        assert fate == row.fate
        if fate == "cut":
            assert (tokens, cut) == (row.tokens, row.cut_tokens)


def test_what_stops_a_run_is_in_the_ledger_with_each_row(
    training_job: Callable[..., Path], qwen2_folder: Path, tmp_path: Path
) -> None:
    folder = training_job(qwen2_folder, max_steps=1, max_seq_length=34)
    train = tmp_path / "train.jsonl"
    found = asked(tmp_path, qwen2_folder, train, max_seq_length=34)
    with pytest.raises(LorasmithError) as stopped:
        run_engine(folder)
    assert found.stops == f"train: {stopped.value.message}"
    assert {row.fate for row in found.parts["train"]} == {Fate.REFUSED}
    assert stopped.value.message.startswith(f"{len(found.parts['train'])} of 24 rows are longer than 34 tokens")


def test_validation_rows_that_all_are_too_long_stop_no_run(
    training_job: Callable[..., Path], qwen2_folder: Path, tmp_path: Path
) -> None:
    folder = training_job(qwen2_folder, max_steps=1, max_seq_length=34, too_long="right")
    val = write_examples(tmp_path / "val.jsonl", counting_examples(10, first=100)[4::5])  # the longest
    found = asked(tmp_path, qwen2_folder, tmp_path / "train.jsonl", val, max_seq_length=34, too_long="right")
    assert ([row.fate for row in found.parts["val"]], found.stops) == ([Fate.DROPPED, Fate.DROPPED], None)
    assert run_engine(folder)["validation_loss"] is None
    (reported,) = events(folder, "rows")
    assert (reported["validation"], reported["validation_dropped"]) == (0, 2)
    (warning,) = events(folder, "warning")
    assert warning["text"] == "there is no validation loss: none of the 2 validation rows fits"


def test_rows_that_fail_a_check_are_refused_one_by_one(qwen2_folder: Path, tmp_path: Path) -> None:
    marked = [conversation(("user", "<|im_end|>"), ("assistant", "b"), row=row) for row in (1, 2)]
    train = write_examples(tmp_path / "train.jsonl", [*marked, *counting_examples(3)])
    found = asked(tmp_path, qwen2_folder, train)
    assert [row.fate for row in found.parts["train"]] == [Fate.REFUSED, Fate.REFUSED]
    assert "check `special-token-in-message`, failed by 2 of 5 rows" in (found.stops or "")
    assert asked(tmp_path, qwen2_folder, train, allow=["special-token-in-message"]).parts["train"] == []
