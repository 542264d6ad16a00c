"""A run that is killed again and again ends bit for bit as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.engine.training.checkpoints import whole_checkpoints
from lorasmith.files import read_json
from tests.engine.small_jobs import counting_examples, events, write_examples

KILLS = 10


def started(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "lorasmith.engine", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )


def killed_while_training(folder: Path, after_s: float) -> bool:
    """Start the engine and kill it so long after it has begun to take steps; False when it ended before."""
    begun = len(phases(folder))
    with started(folder) as process:
        while "train" not in phases(folder)[begun:]:
            assert process.poll() is None, (folder / "error.json").read_text(encoding="utf-8")
            time.sleep(0.005)
        time.sleep(after_s)
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL


def phases(folder: Path) -> list[str]:
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event["data"]["name"] for event in whole if event["type"] == "phase"]


def end_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Adapter, last checkpoint's tensors, and every number that is not a time."""
    last = whole_checkpoints(folder)[-1]
    result = read_json(folder / "result.json")
    numbers = {
        "progress": {key: value for key, value in read_json(last / "progress.json").items() if key != "seconds"},
        "optimizer": read_json(last / "state.json"),
        "steps": {event["step"]: (event["loss"], event["grad_norm"]) for event in events(folder, "step")},
        "evaluations": {event["step"]: event["loss"] for event in events(folder, "evaluation")},
        "result": {key: result[key] for key in ("training_loss", "validation_loss", "trained_tokens", "total_steps")},
    }
    return load_file(folder / "adapter" / "adapter_model.safetensors"), load_file(last / "state.safetensors"), numbers


@pytest.mark.slow
@pytest.mark.parametrize("rows", [24, 25, 26, 27], ids=lambda rows: f"{rows % 4} rows in the last step of an epoch")
def test_killed_at_random_times_it_ends_as_the_uninterrupted_run(
    qwen2_folder: Path, training_job: Callable[..., Path], rows: int
) -> None:
    settings = {"num_epochs": 40, "save_every": 7, "eval_every": 11, "keep_checkpoints": 2, "log_every": 1}
    whole, killed = (training_job(qwen2_folder, name, **settings) for name in ("whole", "killed"))
    write_examples(whole.parent / "train.jsonl", counting_examples(rows))
    with started(whole) as process:
        assert process.wait() == 0
    seconds = read_json(whole / "result.json")["training_time_seconds"]
    rng, kills = random.Random(rows), 0
    while kills < KILLS:  # each takes away what was not saved, so the run is not over before the last
        assert killed_while_training(killed, rng.uniform(0, seconds / KILLS))
        kills += 1
    with started(killed) as process:
        assert process.wait() == 0
    assert events(killed, "resumed")
    adapter, state, numbers = end_state(whole)
    killed_adapter, killed_state, killed_numbers = end_state(killed)
    assert killed_numbers == numbers
    for one, other in ((adapter, killed_adapter), (state, killed_state)):
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, other[name]), name
    # a step that was taken twice was the same step
    for step, loss in ((event["step"], event["loss"]) for event in events(killed, "step")):
        assert loss == numbers["steps"][step][0]
