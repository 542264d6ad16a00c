"""Token counts of a dataset are those of the run that trains on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lorasmith.engine.data import token_chunks
from lorasmith.engine.data.statistics import run
from lorasmith.engine.reporting import Reporter
from lorasmith.schemas.jobs import JobKind, JobOrder
from lorasmith.schemas.statistics import TokenStatistics
from tests.engine.chat_templates import conversation
from tests.engine.small_jobs import counting_examples, events, run_engine, write_examples


def counted(tmp_path: Path, model: Path, files: dict[str, str], **spec: object) -> TokenStatistics:
    folder = tmp_path / "statistics"
    folder.mkdir(exist_ok=True)
    inputs = {
        "model_name": "tiny",
        "model_folder": str(model),
        "examples_files": files,
        "tokens_folder": str(tmp_path / "tokens"),
    }
    order = JobOrder(id="job_1", kind=JobKind.STATISTICS, spec={"data": "counting", **spec}, inputs=inputs)
    return run(order, folder, Reporter(folder))


def test_tokens_are_those_that_training_counts_and_it_tokenises_nothing_again(
    training_job: Callable[..., Path], qwen2_folder: Path, tmp_path: Path, monkeypatch: object
) -> None:
    folder = training_job(qwen2_folder, max_steps=1)
    order = json.loads((folder / "job.json").read_text())
    files = {"train": order["inputs"]["train_file"], "val": order["inputs"]["val_file"]}
    found = counted(tmp_path, qwen2_folder, files)
    order["inputs"]["tokens_folder"] = str(tmp_path / "tokens")
    (folder / "job.json").write_text(json.dumps(order))
    monkeypatch.setattr(token_chunks, "draft_all", None)
    run_engine(folder)
    (reported,) = events(folder, "rows")
    assert found.parts["train"].tokens.total == reported["tokens"]
    assert found.parts["train"].trained.total == reported["trained_tokens"]
    assert found.parts["train"].tokens.count == reported["train"]
    assert found.parts["val"].tokens.count == reported["validation"]
    assert found.context == 256


def test_what_a_limit_cuts_is_what_training_cuts(
    training_job: Callable[..., Path], qwen2_folder: Path, tmp_path: Path
) -> None:
    folder = training_job(qwen2_folder, max_steps=1, max_seq_length=34, too_long="right")
    order = json.loads((folder / "job.json").read_text())
    found = counted(tmp_path, qwen2_folder, {"train": order["inputs"]["train_file"]}, max_seq_length=34)
    run_engine(folder)
    (reported,) = events(folder, "rows")
    assert reported["cut"] > 0
    assert found.parts["train"].over == reported["cut"]
    assert found.parts["train"].over_tokens == reported["cut_tokens"]
    assert found.max_tokens == 34


def test_examples_that_fail_a_check_are_counted(qwen2_folder: Path, tmp_path: Path) -> None:
    marked = [conversation(("user", "<|im_end|>"), ("assistant", "b"), row=row) for row in (1, 2)]
    path = write_examples(tmp_path / "train.jsonl", [*marked, *counting_examples(3)])
    found = counted(tmp_path, qwen2_folder, {"train": str(path)})
    assert found.parts["train"].failed_checks == {"special-token-in-message": 2}
