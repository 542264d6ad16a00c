"""A job whose engine process is really killed by SIGKILL while the command waits for it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorasmith.errors import JobFailed, Killed
from lorasmith.files import read_json
from lorasmith.jobs.folder import write_request
from lorasmith.schemas.jobs import Event, Job, JobRequest, JobStatus
from lorasmith.schemas.training import TrainingSpec
from lorasmith.services.jobs import RESTARTS, show_job
from lorasmith.services.training import start_training, train
from lorasmith.services.workbench import Workbench
from tests.engine.small_jobs import events, run_engine

Asks = Callable[..., Job]


@pytest.fixture
def job(workbench: Workbench, tmp_path: Path) -> Asks:
    """A queued training job of a few steps; keyword arguments go into `training`.

    Its rows are long, so that a step takes longer than the watcher needs to see it.
    """
    file = tmp_path / "rows.csv"
    lines = [f"{n}?,{' '.join(str(n + more) for more in range(150))}\n" for n in range(10)]
    file.write_text("input,output\n" + "".join(lines), encoding="utf-8")

    def make(name: str, **training: object) -> Job:
        settings = {"precision": "fp32", "memory": "lean", "batch_size": 4, "gradient_accumulation_steps": 1}
        settings |= {"num_epochs": 3, "log_every": 1, "save_every": 1, **training}
        lora = {"rank": 4, "alpha": 8, "dropout": 0.1}
        spec = {"model": "starter", "data": str(file), "name": name, "lora": lora, "training": settings}
        return start_training(workbench, TrainingSpec.model_validate(spec))

    return make


class KillsAt:
    """Watches a job, and kills its engine process each time that `when` says so."""

    def __init__(
        self, when: Callable[[Event, int], bool], victim: Callable[[int], int] = lambda engine: engine
    ) -> None:
        """`victim` is the process to kill, by the engine's."""
        self.when, self.victim, self.pid, self.kills = when, victim, 0, 0
        self.warnings: list[str] = []

    def __call__(self, event: Event) -> None:
        if event.type == "started":
            self.pid = event.data["pid"]
        if event.type == "warning":
            self.warnings.append(event.data["text"])
        if self.when(event, self.kills):
            self.kills += 1
            os.kill(self.victim(self.pid), signal.SIGKILL)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def second_process(engine: int) -> int:
    return int(Path(f"/proc/{engine}/task/{engine}/children").read_text().split()[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "victim"),
    [
        pytest.param(1, lambda engine: engine, id="alone"),
        pytest.param(2, lambda engine: engine, id="first-of-two"),
        pytest.param(2, second_process, id="second-of-two"),
    ],
)
def test_a_run_killed_at_its_start_ends_as_one_that_had_been_split_from_the_start(
    workbench: Workbench, job: Asks, processes: int, victim: Callable[[int], int]
) -> None:
    def at_the_start(event: Event, kills: int) -> bool:  # all processes are there when the model is loaded
        return event.type == "phase" and event.data["name"] == "load" and kills == 0

    killed, watch = job("killed", processes=processes), KillsAt(at_the_start, victim)
    train(workbench, killed, watch)
    folder = workbench.path(killed.folder)
    assert show_job(workbench, killed.id).status is JobStatus.COMPLETED
    smaller = read_json(folder / "machine.json")["micro_batch"]
    assert watch.warnings == [
        "the system killed the engine process, most often for its memory; "
        "it goes on from the start with half as much at once",
        f"the last process was killed by the system: {smaller} tokens at once from now on instead of 4096, "
        "for the same update",
    ]
    assert not (folder / "killed.json").exists()
    split = workbench.path(job("split", processes=processes, micro_batch_tokens=smaller).folder)
    run_engine(split)
    for name, tensor in weights(folder).items():
        assert torch.equal(tensor, weights(split)[name]), name


@pytest.mark.slow
def test_a_run_killed_in_the_middle_goes_on_from_its_checkpoint(workbench: Workbench, job: Asks) -> None:
    killed = job("killed")
    watch = KillsAt(lambda event, kills: event.type == "checkpoint" and kills == 0)
    train(workbench, killed, watch)
    folder = workbench.path(killed.folder)
    (resumed,) = events(folder, "resumed")
    assert f"it goes on from {resumed['checkpoint']} with half as much at once" in watch.warnings[0]
    assert read_json(folder / "machine.json")["micro_batch"] < 4096
    whole = workbench.path(job("whole").folder)
    run_engine(whole)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(weights(folder)[name], tensor, rtol=0, atol=1e-5 * tensor.abs().max().item())  # fp32


def test_a_run_that_is_killed_again_and_again_without_progress_fails(workbench: Workbench, job: Asks) -> None:
    settings = {"num_epochs": 100, "save_every": 1000}  # no checkpoint before the kill, however late that comes
    killed, watch = job("killed", **settings), KillsAt(lambda event, kills: event.type == "started")
    with pytest.raises(JobFailed, match=f"killed the engine process {RESTARTS + 1} times without a new checkpoint"):
        train(workbench, killed, watch)
    assert watch.kills == RESTARTS + 1
    row = show_job(workbench, killed.id)
    assert (row.status, row.reason_code) == (JobStatus.FAILED, "oom")


def test_a_run_that_was_asked_to_stop_is_not_started_again(workbench: Workbench, job: Asks) -> None:
    killed = job("killed", num_epochs=100)

    def asks_and_kills(event: Event, kills: int) -> bool:
        if event.type == "started":
            os.kill(event.data["pid"], signal.SIGSTOP)  # it does not read the request before it is killed
            write_request(workbench.path(killed.folder), JobRequest.CANCEL)
        return event.type == "started"

    watch = KillsAt(asks_and_kills)
    with pytest.raises(JobFailed, match="was killed by SIGKILL") as failure:
        train(workbench, killed, watch)
    assert not isinstance(failure.value, Killed)
    assert watch.kills == 1
    assert show_job(workbench, killed.id).reason == "the engine process was killed by SIGKILL"


def test_a_run_that_asks_for_a_gpu_waits_for_it_and_not_for_cores(job: Asks) -> None:
    assert (job("asks", device="cuda").lane, job("takes-what-is-there").lane) == ("cuda", "cpu")
