"""Steps, checkpoints and adapters whose values are not finite: what is left out, what fails, and what stays."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.training.batches import plan_steps
from lorasmith.engine.training.checkpoints import whole_checkpoints
from lorasmith.engine.training.guards import check_result
from lorasmith.errors import Interrupted, JobFailed
from lorasmith.schemas.data import Message
from lorasmith.schemas.training import TrainingSettings
from tests.engine.small_jobs import (
    counting_examples,
    events,
    run_engine,
    stop_at_step,
    weights,
    write_examples,
)

Job = Callable[..., Path]


def poisoned(folder: Path, token: int) -> None:
    """Make the embedding of one token infinite."""
    weights_file = folder / "model.safetensors"
    tensors = load_file(weights_file)
    tensors["model.embed_tokens.weight"][token] = math.inf
    save_file(tensors, weights_file, metadata={"format": "pt"})


@pytest.fixture
def poisoned_base(qwen2_folder: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> Path:
    """A base that answers with values that are not finite once it reads `~`."""
    base = shutil.copytree(qwen2_folder, tmp_path / "base")
    poisoned(base, int(tokenizer.convert_tokens_to_ids("~")))  # type: ignore[arg-type]
    return base


def test_a_step_that_is_not_finite_is_left_out_and_its_rows_are_named(poisoned_base: Path, training_job: Job) -> None:
    folder = training_job(poisoned_base, num_epochs=2)
    examples = counting_examples(24)
    messages = [Message(role="user", content="~"), Message(role="assistant", content="tilde")]
    rare = examples[9] = examples[9].model_copy(update={"messages": messages})
    write_examples(folder.parent / "train.jsonl", examples)
    run_engine(folder)
    warnings = [event["text"] for event in events(folder, "warning")]
    assert len(warnings) == 2  # once in each epoch
    for text in warnings:
        assert re.fullmatch(rf"step \d+ is left out: its loss is nan; rows \[{rare.row}\]", text)
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


def test_a_run_that_explodes_stops_with_its_last_finite_adapter(qwen2_folder: Path, training_job: Job) -> None:
    folder = training_job(qwen2_folder, learning_rate=1e18, max_grad_norm=1e18, num_epochs=4)
    with pytest.raises(JobFailed, match=r"step \d+ cannot be taken: .*; 3 steps were left out before it; rows \["):
        run_engine(folder)
    state = load_file(whole_checkpoints(folder)[-1] / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize(
    ("save_every", "message"),
    [
        (1, r"after step 5 the weights of .*lora_A.* are not finite; its rows \[{rows}\]"),
        (
            6,
            r"after step 6 the weights of .*lora_A.* are not finite; step 6 is left out: its loss is nan; rows \[{rows}\]",
        ),
        (8, r"step 7 cannot be taken: its loss is nan; 1 steps were left out before it; rows \[{rows}\]"),
    ],
)
def test_values_that_are_not_finite_never_replace_a_finite_checkpoint(
    qwen2_folder: Path, training_job: Job, save_every: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = training_job(qwen2_folder, keep_checkpoints=1, save_every=save_every, max_skipped_steps=1, num_epochs=4)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stop_at_step(4, patched)
        run_engine(folder)
    before = read_bytes(folder / "checkpoints")
    change_setting(folder, "learning_rate", 1e39)  # from here on each update is infinite
    with pytest.raises(JobFailed) as failure:
        run_engine(folder)
    assert failure.value.code == "non_finite"
    told = message.format(rows=r"(\d+, ){3}\d+") + "; the last finite adapter is in checkpoints/step-000004"
    assert re.fullmatch(told, failure.value.message)
    assert read_bytes(folder / "checkpoints") == before

    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(JobFailed, match="; there is no finite checkpoint$"):
        run_engine(folder)


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_setting(folder: Path, name: str, value: Any) -> None:
    order = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    order["spec"]["training"][name] = value
    (folder / "job.json").write_text(json.dumps(order), encoding="utf-8")


@pytest.mark.parametrize("with_validation", [True, False])
def test_a_model_that_answers_nan_is_not_called_completed(
    qwen2_folder: Path, training_job: Job, with_validation: bool
) -> None:
    folder = training_job(qwen2_folder, learning_rate=1e18, max_grad_norm=1e18, max_steps=3)
    if not with_validation:
        without_validation(folder)
    with pytest.raises(JobFailed) as failure:
        run_engine(folder)
    assert failure.value.code == "non_finite"
    told = (
        "the validation loss after step 3 is nan"
        if with_validation
        else "the run ends with a step that was left out, and no validation says that the adapter still works"
    )
    assert re.fullmatch(rf"{told}; step 3 is left out: its loss is nan; rows \[.*\d\]", failure.value.message)
    state = load_file(whole_checkpoints(folder)[-1] / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())  # only what they make of an input is not


def without_validation(folder: Path) -> None:
    order = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    order["inputs"]["val_file"] = None
    (folder / "job.json").write_text(json.dumps(order), encoding="utf-8")


def test_a_bad_row_in_the_last_step_does_not_undo_a_run_that_validates(poisoned_base: Path, training_job: Job) -> None:
    folder = training_job(poisoned_base, max_steps=6)
    row = plan_steps(24, batch_size=4, accumulation=1, epochs=1, max_steps=6, seed=TrainingSettings().seed).row_indices(
        5
    )[0]
    examples = counting_examples(24)
    messages = [Message(role="user", content="~"), Message(role="assistant", content="tilde")]
    examples[row] = examples[row].model_copy(update={"messages": messages})
    write_examples(folder.parent / "train.jsonl", examples)
    result = run_engine(folder)
    assert [event["text"] for event in events(folder, "warning")] == [
        f"step 6 is left out: its loss is nan; rows [{examples[row].row}]"
    ]
    assert math.isfinite(result["validation_loss"])


@pytest.mark.parametrize(("value", "code"), [(math.nan, "non_finite"), (0.0, "nothing_learned")])
def test_an_adapter_that_is_no_result_is_not_called_one(value: float, code: str) -> None:
    with pytest.raises(JobFailed) as failure:
        check_result(
            {"q.lora_A.default.weight": torch.ones(2, 3), "q.lora_B.default.weight": torch.full((3, 2), value)}
        )
    assert failure.value.code == code
