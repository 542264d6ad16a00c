"""Several processes against one: the same rows, sums, updates and adapters, and one job to whoever looks at it."""

from __future__ import annotations

import json
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

from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.devices import launch, shares
from lorasmith.errors import JobFailed, Killed, Paused
from lorasmith.jobs.folder import write_request
from lorasmith.schemas.jobs import JobRequest
from tests.engine.decoder_cases import worst_difference
from tests.engine.device_steps import CASES, one_step, short_of_memory
from tests.engine.small_jobs import events, run_engine, weights
from tests.waiting import gone

Job = Callable[..., Path]
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all"}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_row_is_dealt_once_and_tokens_are_balanced(count: int) -> None:
    indices, tokens = [9, 2, 5, 7, 0, 4], [30, 10, 25, 10, 40, 5]
    dealt = shares(indices, tokens, count)
    assert len(dealt) == count
    assert sorted(index for share in dealt for index in share) == sorted(indices)
    loads = [sum(tokens[indices.index(index)] for index in share) for share in dealt]
    assert max(loads) - min(loads) <= max(tokens)
    assert dealt == shares(indices, tokens, count)


def test_two_processes_give_the_gradients_and_the_update_of_one_also_when_memory_is_short(tmp_path: Path) -> None:
    with launch(2, tmp_path, "tests.engine.device_steps") as devices:
        together = {case: one_step(case, devices) for case in CASES}
        short, split, refusal = short_of_memory(devices)
        devices.peers[0].kill()
        with pytest.raises(Killed, match="process 2 of 2 was killed by SIGKILL"):
            devices.gather(None)
    assert "WORLD_SIZE" not in os.environ
    for case, step in together.items():
        alone = one_step(case)
        assert step.nats == pytest.approx(alone.nats, rel=1e-6), case
        assert worst_difference(step.gradients, alone.gradients) <= 1e-5, case  # fp32
        if case.endswith("float64"):
            for name, value in alone.updated.items():
                torch.testing.assert_close(step.updated[name], value, atol=1e-10, rtol=0)
    assert short.at_once == (33 + 7 + 2) // 2  # in the first process too, whose largest is 61
    assert short.nats == split.nats
    for name, value in split.updated.items():
        assert torch.equal(short.updated[name], value), name
    assert refusal == "row 1 with 33 tokens does not fit into memory, though it is computed alone"


def test_a_process_that_does_not_answer_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(JobFailed, match="one of 2 processes has not answered for 0.1 s"),
        launch(2, tmp_path, "tests.engine.device_steps", timeout_s=0.1),
    ):
        raise AssertionError("Python does not start in a tenth of a second")


def test_a_process_that_dies_before_it_joins_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(JobFailed, match="process 2 of 2 ended with status 1"),
        launch(2, tmp_path, "tests.engine.no_such_module"),
    ):
        raise AssertionError("a process is missing")


def assert_near(one: Path, other: Path) -> None:
    assert worst_difference(weights(one), weights(other)) <= 1e-5  # float32, six updates


def test_two_processes_make_the_adapter_of_one_also_when_paused_and_resumed(
    qwen2_folder: Path, training_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AsksForAPause(Reporter):
        def __call__(self, type: str, **data: Any) -> None:
            super().__call__(type, **data)
            if type == "step" and data["step"] == 3:
                write_request(self.path.parent, JobRequest.PAUSE)

    settings = {"lora": {**LORA, "dropout": 0.1}, "num_epochs": 1, "learning_rate": 1e-3}
    whole, two = (training_job(qwen2_folder, f"with{count}", processes=count, **settings) for count in (1, 2))
    expected = run_engine(whole)
    with monkeypatch.context() as patched:
        patched.setattr("tests.engine.small_jobs.Reporter", AsksForAPause)
        with pytest.raises(Paused, match="stopped after step 3 of 6; everything is saved"):
            run_engine(two)
    one = Path(shutil.copytree(two, two.with_name("then1")))
    order = json.loads((one / "job.json").read_text(encoding="utf-8"))
    order["spec"]["training"]["processes"] = 1
    (one / "job.json").write_text(json.dumps(order), encoding="utf-8")

    result = run_engine(two)
    assert result["training_loss"] == pytest.approx(expected["training_loss"], abs=1e-5)  # float32
    assert result["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-5)
    assert result["trained_tokens"] == expected["trained_tokens"]
    assert_near(two, whole)
    assert [event["step"] for event in events(two, "step")] == [1, 2, 3, 4, 5, 6]
    lines = (two / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["seq"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(list((two / "tb").iterdir())) == 2  # one of each run, and none of the second process
    assert not (two / "rendezvous").exists()
    assert not events(two, "warning")

    run_engine(one)
    announced = "processes was 2 and is 1: the run is no longer exactly repeatable"
    assert announced in [event["text"] for event in events(one, "warning")]
    assert_near(one, whole)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{"use_dora": True}, {"init": "pissa"}], ids=["peft", "pissa"])
def test_other_ways_of_training_make_the_same_adapter(
    qwen2_folder: Path, training_job: Job, lora: dict[str, Any]
) -> None:
    settings = {"lora": {**LORA, **lora}, "num_epochs": 1, "learning_rate": 1e-3, "keep_best": True}
    one, two = (training_job(qwen2_folder, f"with{count}", processes=count, **settings) for count in (1, 2))
    run_engine(one)
    run_engine(two)
    assert bool(events(two, "paths")) == ("init" in lora)
    assert_near(two, one)


def start(folder: Path) -> subprocess.Popen[bytes]:
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen([sys.executable, "-m", "lorasmith.engine", str(folder)], stdout=log, stderr=log)


def wait_for_step(folder: Path, process: subprocess.Popen[bytes], step: int) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "events.jsonl").exists() or not any(e["step"] >= step for e in events(folder, "step")):
        assert time.monotonic() < deadline
        assert process.poll() is None, (folder / "log.txt").read_text()
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_job_of_two_processes_is_one_to_signals(qwen2_folder: Path, training_job: Job) -> None:
    folder = training_job(qwen2_folder, num_epochs=2000, processes=2)
    with start(folder) as process:
        wait_for_step(folder, process, 2)
        peers = children(process.pid)
        assert len(peers) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 5
        assert all(map(gone, peers))
    saved = events(folder, "checkpoint")[-1]["step"]

    with start(folder) as process:
        wait_for_step(folder, process, saved + 2)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        assert process.wait(300) == -signal.SIGKILL  # so that who waits starts it again with half as much at once
    assert (folder / "log.txt").read_text(encoding="utf-8").splitlines()[-1] == "process 2 of 2 was killed by SIGKILL"
    assert not (folder / "error.json").exists()

    with start(folder) as process:
        resumed_from = events(folder, "step")[-1]["step"]
        wait_for_step(folder, process, resumed_from + 2)
        peers = children(process.pid)
        process.kill()
        deadline = time.monotonic() + 120
        while not all(map(gone, peers)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
