"""What a run does with its validation losses, and the schedule that leads there."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.engine.data.rendering import render_example
from lorasmith.engine.models.loading import load_adapter, load_model, load_tokenizer
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.batches import pad_batch
from lorasmith.engine.training.checkpoints import best_folder, load_progress, whole_checkpoints
from lorasmith.engine.training.computation import PackedComputation
from lorasmith.errors import Interrupted, InvalidSpec
from tests.engine.small_jobs import (
    assert_same_bits,
    counting_examples,
    events,
    run_engine,
    stop_and_resume,
    stop_at_step,
    weights,
)

Job = Callable[..., Path]
MEASURED = ("training_time_seconds", "tokens_per_s", "peak_memory_bytes")


def validation_loss(base: Path, adapter: Path) -> float:
    """Mean loss in nats by transformers and PEFT over the four validation rows of a small job."""
    model, tokenizer = load_adapter(load_model(base), adapter), load_tokenizer(base)
    stop = {int(tokenizer.eos_token_id)}  # type: ignore[arg-type]
    rows = [render_example(tokenizer, example, stop) for example in counting_examples(4, first=100)]
    ids, labels = pad_batch(rows, pad_id=0)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


def test_a_run_that_no_longer_improves_stops_and_keeps_its_best(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"early_stopping_patience": 3, "keep_best": True, "learning_rate": 0.1, "num_epochs": 6, "eval_every": 2}
    whole, stopped = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "stopped", **settings)
    result = run_engine(whole)
    evaluations = {event["step"]: event["loss"] for event in events(whole, "evaluation")}
    best = min(evaluations, key=lambda step: evaluations[step])
    last = max(evaluations)
    assert last == best + 3 * 2 < 36
    assert result["stopped_early"]
    assert (result["total_steps"], result["planned_steps"], result["adapter_step"]) == (last, 36, best)
    assert result["validation_loss"] == evaluations[best] == result["best_validation_loss"]
    notes = [event["text"] for event in events(whole, "note")]
    assert (
        f"stopped early after step {last} of 36: no better validation loss in 3 evaluations, "
        f"the best is {evaluations[best]:.4f}"
    ) in notes
    assert f"the adapter is that of step {best}, validation loss {evaluations[best]:.4f}" in notes
    assert best_folder(whole, best).is_dir()
    # float32, in another order than in training
    assert validation_loss(qwen2_folder, whole / "adapter") == pytest.approx(evaluations[best], abs=1e-4)

    resumed = stop_and_resume(stopped, monkeypatch)
    assert {**resumed, **dict.fromkeys(MEASURED)} == {**result, **dict.fromkeys(MEASURED)}
    assert [event["step"] for event in events(stopped, "evaluation")] == list(evaluations)
    assert_same_bits(whole, stopped)

    taken = len(events(stopped, "step"))
    shutil.rmtree(stopped / "adapter")  # as after a crash between the last step and the result
    run_engine(stopped)
    assert len(events(stopped, "step")) == taken
    assert_same_bits(whole, stopped)


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 8, "eval_every": 1, "keep_best": True}  # the stop is at step 5, where one is due
    whole, stopped = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "stopped", **settings)
    run_engine(whole)
    stop_and_resume(stopped, monkeypatch)
    assert events(stopped, "evaluation") == events(whole, "evaluation")
    assert_same_bits(whole, stopped)


def test_a_stop_at_the_step_that_ends_a_run_early_loses_none_of_its_measurements(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"early_stopping_patience": 1, "learning_rate": 3.0, "eval_every": 3, "log_every": 2, "num_epochs": 8}
    whole, stopped = training_job(qwen2_folder, "whole", **settings), training_job(qwen2_folder, "stopped", **settings)
    expected = run_engine(whole)
    assert (expected["total_steps"], expected["stopped_early"]) == (3, True)

    class StopsAtTheEnd(Reporter):
        def poll(self) -> bool:
            self.polls = getattr(self, "polls", 0) + 1  # once a step
            self.stop_requested = self.polls == 3
            return False

    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="stopped after step 3"):
        patched.setattr("tests.engine.small_jobs.Reporter", StopsAtTheEnd)
        run_engine(stopped)
    resumed = run_engine(stopped)
    assert {**resumed, **dict.fromkeys(MEASURED)} == {**expected, **dict.fromkeys(MEASURED)}
    timed = dict.fromkeys(("tokens_per_s", "eta_s"))
    for kind in ("step", "evaluation"):
        first, second = ([{**event, **timed} for event in events(folder, kind)] for folder in (whole, stopped))
        assert first == second
    one, other = (load_progress(whole_checkpoints(folder)[-1]) for folder in (whole, stopped))
    assert replace(one, seconds=0.0) == replace(other, seconds=0.0)
    assert_same_bits(whole, stopped)


def test_a_run_that_goes_on_from_an_old_checkpoint_still_has_its_best_weights(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = training_job(qwen2_folder, max_steps=8, keep_best=True)
    run_engine(folder)
    oldest, *newer = whole_checkpoints(folder)
    for checkpoint in newer:  # as after damage
        shutil.rmtree(checkpoint)
    best = load_progress(oldest).best
    assert best is not None
    monkeypatch.setattr(PackedComputation, "loss", lambda *_: 1e6)  # from here on it is only worse
    again = run_engine(folder)
    assert (again["adapter_step"], again["validation_loss"]) == best
    kept = load_file(best_folder(folder, best[0]) / "weights.safetensors")
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, kept[name.replace(".weight", ".default.weight")]), name


def flipped(folder: Path) -> str:
    stored = bytearray((folder / "weights.safetensors").read_bytes())
    stored[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(stored)
    return f"{folder} is damaged: weights.safetensors does not match its checksum"


def removed(folder: Path) -> str:
    shutil.rmtree(folder.parent)
    return f"{folder} is missing"


@pytest.mark.parametrize("harm", [flipped, removed])
@pytest.mark.parametrize("stop", [15, 16, None])  # at 16 a validation is due, which the stop leaves out
def test_where_the_best_weights_are_damaged_the_next_validation_is_the_best(
    qwen2_folder: Path,
    training_job: Job,
    harm: Callable[[Path], str],
    stop: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = training_job(qwen2_folder, keep_best=True, learning_rate=0.1, num_epochs=4, eval_every=2)
    with monkeypatch.context() as patched, pytest.raises(Interrupted) if stop else contextlib.nullcontext():
        if stop:
            stop_at_step(stop, patched)
        run_engine(folder)
    progress = load_progress(whole_checkpoints(folder)[-1])
    assert progress.best is not None
    step, loss = progress.best
    last = progress.validation[-1][0]
    assert step <= last == (14 if stop else 24)
    shutil.rmtree(folder / "adapter", ignore_errors=True)  # as after a crash between the last step and the result
    damage = harm(best_folder(folder, step))
    result = run_engine(folder)
    assert [event["text"] for event in events(folder, "warning")] == [
        f"{damage}; the weights of step {step}, the best so far with a validation loss of {loss:.4f}, are lost: the adapter "
        f"will be the best of the validations after step {last}, or that of the last step"
    ]
    losses = dict(load_progress(whole_checkpoints(folder)[-1]).validation)
    after = {step: loss for step, loss in losses.items() if step > last} or {24: losses[24]}
    assert result["adapter_step"] == min(after, key=lambda step: after[step])
    assert result["validation_loss"] == min(after.values())
    # float32, in another order than in training
    assert validation_loss(qwen2_folder, folder / "adapter") == pytest.approx(min(after.values()), abs=1e-4)


@pytest.mark.parametrize("setting", [{"early_stopping_patience": 2}, {"keep_best": True}])
def test_watching_the_validation_loss_needs_validation_rows(
    qwen2_folder: Path, training_job: Job, setting: dict[str, Any]
) -> None:
    folder = training_job(qwen2_folder, **setting)
    order = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    order["inputs"]["val_file"] = None
    (folder / "job.json").write_text(json.dumps(order), encoding="utf-8")
    (name,) = setting
    with pytest.raises(InvalidSpec, match=f"{name} needs validation rows, and dataset 'counting' has none that fit"):
        run_engine(folder)


def test_a_warmup_ratio_reaches_the_peak_after_its_share(qwen2_folder: Path, training_job: Job) -> None:
    folder = training_job(qwen2_folder, warmup_ratio=0.25, lr_scheduler="linear", num_epochs=2)
    run_engine(folder)
    rates = [event["learning_rate"] for event in events(folder, "step")]
    rising = [1e-2 * (step + 1) / 4 for step in range(3)]  # 3 of 12 steps
    falling = [1e-2 * (1 - step / 9) for step in range(9)]
    assert rates == pytest.approx(rising + falling)
