"""The training engine against its references: transformers for the loss, PEFT for the adapter, itself for resuming."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from lorasmith.engine.data.rendering import render_example
from lorasmith.engine.models.loading import load_adapter, load_model
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.batches import pad_batch
from lorasmith.engine.training.checkpoints import whole_checkpoints
from lorasmith.engine.training.loss import CompletionLoss
from lorasmith.errors import Cancelled, Interrupted, InvalidData, InvalidModel, InvalidSpec, Paused
from lorasmith.jobs.folder import write_request
from lorasmith.schemas.jobs import JobRequest
from tests.engine.small_jobs import (
    assert_same_bits,
    counting_examples,
    events,
    run_engine,
    stop_at_step,
    weights,
)

Job = Callable[..., Path]


def test_the_loss_is_that_of_transformers(qwen2_folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = load_model(qwen2_folder)
    rows = [render_example(tokenizer, example, {int(tokenizer.eos_token_id)}) for example in counting_examples(5)]  # type: ignore[arg-type]
    ids, labels = pad_batch(rows, pad_id=0)
    loss = CompletionLoss(model, len(tokenizer))
    assert loss.head_on_labels
    expected = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(loss(ids, labels) / (labels[:, 1:] != -100).sum(), expected, atol=1e-5, rtol=0)


def test_a_cap_of_the_logits_is_seen_where_they_are_small_yet() -> None:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = AutoConfig.for_model("gemma2", vocab_size=64, num_key_value_heads=1, final_logit_softcapping=30.0, **sizes)
    capped = AutoModelForCausalLM.from_config(config)
    logits = capped(input_ids=torch.arange(8).unsqueeze(0)).logits
    assert logits.abs().max() < 1
    assert not CompletionLoss(capped, 64).head_on_labels
    config.final_logit_softcapping = None
    assert CompletionLoss(AutoModelForCausalLM.from_config(config), 64).head_on_labels


def test_training_lowers_the_loss_and_writes_what_peft_loads(qwen2_folder: Path, training_job: Job) -> None:
    folder = training_job(qwen2_folder, num_epochs=8)
    result = run_engine(folder)
    losses = [event["loss"] for event in events(folder, "evaluation")]
    assert losses[0] == pytest.approx(math.log(2048), abs=0.1)  # random weights know nothing
    assert losses[-1] < losses[0] - 0.5  # 48 steps of rank 4 under a random output head
    adapter = folder / "adapter"
    for name in ("README.md", "loss.png", "passport.json", "tokenizer.json", "manifest.json"):
        assert (adapter / name).is_file(), name
    assert (adapter / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tb").glob("events.out.tfevents.*"))
    assert (sum(result["paths"].values()), result["fallback"]) == (14, None)
    assert "peft" not in result["paths"]
    assert result["trainable_parameters"] == sum(tensor.numel() for tensor in weights(folder).values())

    ids = torch.arange(32).unsqueeze(0)
    with torch.no_grad():
        reference = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(qwen2_folder), adapter).eval()(ids).logits
        )
        ours = load_adapter(load_model(qwen2_folder), adapter)(ids).logits
        base = load_model(qwen2_folder)(ids).logits
    torch.testing.assert_close(ours, reference, atol=1e-5, rtol=0)
    assert (ours - base).abs().max() > 1e-2


def test_the_batch_layout_does_not_change_the_result(qwen2_folder: Path, training_job: Job) -> None:
    losses = []
    for batch, accumulation in ((8, 1), (4, 2), (1, 8)):
        lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all"}
        settings = {"batch_size": batch, "gradient_accumulation_steps": accumulation, "num_epochs": 1}
        folder = training_job(qwen2_folder, f"b{batch}", lora=lora, **settings)
        losses.append(run_engine(folder)["training_loss"])
    # float32 sums in another order, three AdamW updates
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)
    assert losses[2] == pytest.approx(losses[0], abs=2e-4)


@pytest.mark.parametrize(("stop_after", "memory"), [(1, "lean"), (5, "lean"), (6, "lean"), (7, "fast")])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one(
    qwen2_folder: Path, training_job: Job, stop_after: int, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training_job(qwen2_folder, "whole", memory=memory)
    expected = run_engine(whole)

    stopped = training_job(qwen2_folder, "stopped", memory=memory)
    with monkeypatch.context() as patched:
        stop_at_step(stop_after, patched)
        with pytest.raises(Interrupted, match=f"stopped after step {stop_after} of 12; everything is saved"):
            run_engine(stopped)
    assert not (stopped / "adapter").exists()
    resumed = run_engine(stopped)
    assert [event["step"] for event in events(stopped, "resumed")] == [stop_after]
    assert resumed["training_loss"] == expected["training_loss"]
    assert resumed["validation_loss"] == expected["validation_loss"]
    assert_same_bits(whole, stopped)


@pytest.mark.parametrize("part", ["base", "training rows", "validation rows"])
def test_a_run_goes_on_with_what_it_began_with_alone(
    qwen2_folder: Path, training_job: Job, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(qwen2_folder, tmp_path / "model")
    files = {"base": "model/model.safetensors", "training rows": "train.jsonl", "validation rows": "val.jsonl"}
    folder, changed = training_job(model), tmp_path / files[part]
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stop_at_step(5, patched)
        run_engine(folder)
    before = changed.read_bytes()
    if part == "base":
        tuned = {name: 1.01 * weight for name, weight in load_file(changed).items()}
        save_file(tuned, changed, metadata={"format": "pt"})
    else:
        changed.write_bytes(b"".join(before.splitlines(keepends=True)[:-1]))
    with pytest.raises(
        InvalidData, match=f"/(model|.*jsonl) has changed, and a run goes on with the {part} that it began with"
    ):
        run_engine(folder)
    changed.write_bytes(before)
    run_engine(folder)
    assert [event["step"] for event in events(folder, "resumed")] == [5]


def test_what_frozen_layers_compute_is_kept_while_the_run_can_go_on_and_removed_when_it_is_completed(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all", "layers": [1]}
    whole, stopped = (
        training_job(qwen2_folder, name, lora=lora, prefix_cache_gb=5e-5) for name in ("whole", "stopped")
    )
    run_engine(whole)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stop_at_step(7, patched)
        run_engine(stopped)
    assert (stopped / "prefix" / "streams.bin").stat().st_size > 40_000
    monkeypatch.setattr("lorasmith.engine.training.choices.FREE_DISK_SHARE", 1e-9)  # the disk has filled up since
    run_engine(stopped)
    assert not (stopped / "prefix").exists()
    assert not (whole / "prefix").exists()
    assert_same_bits(whole, stopped)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_whole_checkpoint(qwen2_folder: Path, training_job: Job) -> None:
    whole = training_job(qwen2_folder, "whole", num_epochs=20)
    killed = training_job(qwen2_folder, "killed", num_epochs=20)
    command = [sys.executable, "-m", "lorasmith.engine", str(killed)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not whole_checkpoints(killed):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (killed / "result.json").exists()
    (killed / "checkpoints" / ".staging-torn").mkdir()  # what a kill during a save leaves
    (killed / "checkpoints" / "step-999999").mkdir()
    subprocess.run(command, check=True, capture_output=True)
    subprocess.run([*command[:-1], str(whole)], check=True, capture_output=True)
    assert_same_bits(whole, killed)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncated(newest: Path) -> str:
    with (newest / "state.safetensors").open("r+b") as handle:
        handle.truncate(100)
    return f"{newest} is damaged: state.safetensors does not match its checksum; it is passed over"


def bit_flipped(newest: Path) -> str:
    flip_a_bit(newest / "adapter_model.safetensors")
    return f"{newest} is damaged: adapter_model.safetensors does not match its checksum; it is passed over"


def emptied(newest: Path) -> str:
    shutil.rmtree(newest)
    newest.mkdir()
    return f"{newest} is damaged: manifest.json is missing; it is passed over"


def without_a_list(newest: Path) -> str:
    manifest = newest / "manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf-8").replace('"files"', '"filer"'), encoding="utf-8")
    return f"{newest} is damaged: manifest.json does not list files with their checksums; it is passed over"


def half_written(newest: Path) -> str:
    staging = newest.with_name(".staging-01J")
    newest.rename(staging)
    (staging / "manifest.json").unlink()
    return "checkpoints/.staging-01J was never finished, and is removed"


@pytest.mark.parametrize("harm", [truncated, bit_flipped, emptied, without_a_list, half_written])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    qwen2_folder: Path, training_job: Job, harm: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = training_job(qwen2_folder, "whole", keep_checkpoints=2)
    run_engine(whole)
    hurt = training_job(qwen2_folder, "hurt", keep_checkpoints=2)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        stop_at_step(9, patched)
        run_engine(hurt)
    newest, before = whole_checkpoints(hurt)[-1], whole_checkpoints(hurt)[-2]
    expected = harm(newest)
    run_engine(hurt)
    assert [event["text"] for event in events(hurt, "warning")] == [expected]
    assert [event["checkpoint"] for event in events(hurt, "resumed")] == [before.name]
    assert_same_bits(whole, hurt)
    first, second = (load_file(whole_checkpoints(folder)[-1] / "state.safetensors") for folder in (whole, hurt))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list((hurt / "checkpoints").glob(".staging-*"))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_silently_begin_again(
    qwen2_folder: Path, training_job: Job
) -> None:
    folder = training_job(qwen2_folder)
    run_engine(folder)
    damaged = whole_checkpoints(folder)
    for checkpoint in damaged:
        flip_a_bit(checkpoint / "progress.json")
    with pytest.raises(
        InvalidData, match="no checkpoint is whole, so the run cannot go on: .*progress.json"
    ) as failure:
        run_engine(folder)
    assert str(folder / "checkpoints") in str(failure.value.hint)
    assert whole_checkpoints(folder) == damaged  # nothing is moved, so that a copy can be put back
    shutil.rmtree(folder / "checkpoints")
    run_engine(folder)


def test_a_signal_saves_and_stops_with_exit_code_5(qwen2_folder: Path, training_job: Job) -> None:
    folder = training_job(qwen2_folder, num_epochs=2000)
    with subprocess.Popen(
        [sys.executable, "-m", "lorasmith.engine", str(folder)], stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 120
        while not (folder / "events.jsonl").exists() or not events(folder, "step"):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(300) == 5
    error = json.loads((folder / "error.json").read_text(encoding="utf-8"))
    assert error["reason_code"] == "interrupted"
    assert "--resume" in error["hint"]
    assert whole_checkpoints(folder)


def test_a_target_that_matches_nothing_is_an_error(qwen2_folder: Path, training_job: Job) -> None:
    lora = {"rank": 4, "alpha": 8, "target_modules": ["q_porj"]}
    with pytest.raises(InvalidSpec, match="target module 'q_porj' matches no linear layer; did you mean 'q_proj'"):
        run_engine(training_job(qwen2_folder, lora=lora))


def test_roles_are_resolved_on_the_loaded_model(qwen2_folder: Path) -> None:
    from lorasmith.engine.lora.config import resolve_target_modules

    model = load_model(qwen2_folder)
    assert resolve_target_modules(model, "attention") == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert resolve_target_modules(model, "mlp") == ["down_proj", "gate_proj", "up_proj"]
    assert "lm_head" not in resolve_target_modules(model, "all")
    with pytest.raises(InvalidSpec, match="no target role 'attn'"):
        resolve_target_modules(model, "attn")


def test_an_adapter_of_another_base_does_not_load(qwen2_folder: Path, starter: Path, training_job: Job) -> None:
    folder = training_job(qwen2_folder, max_steps=1)
    run_engine(folder)
    with pytest.raises(InvalidModel, match="does not fit LlamaForCausalLM"):
        load_adapter(load_model(starter), folder / "adapter")


@pytest.mark.parametrize(("asked", "error"), [("pause", Paused), ("cancel", Cancelled), ("checkpoint", None)])
def test_a_control_file_acts_within_a_step(
    qwen2_folder: Path, training_job: Job, asked: str, error: type[Interrupted] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Asks(Reporter):
        def __call__(self, type: str, **data: Any) -> None:
            super().__call__(type, **data)
            if type == "step" and data["step"] == 2:
                write_request(self.path.parent, JobRequest(asked))

    monkeypatch.setattr("tests.engine.small_jobs.Reporter", Asks)
    folder = training_job(qwen2_folder)
    with pytest.raises(error) if error else contextlib.nullcontext():
        run_engine(folder)
    saved = [event["step"] for event in events(folder, "checkpoint")]
    assert saved == ([2] if error else [2, 4, 8, 12])
    assert not (folder / "control.json").exists()


def test_a_precision_that_was_measured_is_said_and_one_that_was_asked_for_is_not(
    qwen2_folder: Path, training_job: Job
) -> None:
    measured, asked = (
        training_job(qwen2_folder, "measured", max_steps=1, precision="auto"),
        training_job(qwen2_folder, "asked", max_steps=1),
    )
    found = [run_engine(folder)["precision"] for folder in (measured, asked)]
    said = [
        [note["text"] for note in events(folder, "note") if note["text"].startswith("computes in")]
        for folder in (measured, asked)
    ]
    assert said == [[f"computes in {found[0]}, which was measured to suit this machine when the run began"], []]


def test_training_through_peft_is_said(qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorasmith.engine.models.families.FAMILIES", ("llama",))
    folder = training_job(qwen2_folder, max_steps=3)
    result = run_engine(folder)
    notes = [event["text"] for event in events(folder, "note")]
    assert "trains through PEFT, several times slower: the family 'qwen2' is not one of llama" in notes
    assert result["paths"] == {"peft": 14}  # 2 layers of 7 linear modules
    assert result["fallback"] == "the family 'qwen2' is not one of llama"
    card = (folder / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| computed by PEFT, as | the family 'qwen2' is not one of llama |\n\n" in card
    assert not events(folder, "paths")


def test_peft_and_the_packed_decoder_learn_the_same(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all"}
    packed = run_engine(training_job(qwen2_folder, "packed", lora=lora))
    monkeypatch.setattr("lorasmith.engine.models.families.FAMILIES", ())
    peft = run_engine(training_job(qwen2_folder, "peft", lora=lora))
    assert packed["training_loss"] == pytest.approx(peft["training_loss"], abs=2e-4)  # float32, 12 AdamW updates
    assert packed["validation_loss"] == pytest.approx(peft["validation_loss"], abs=2e-4)
