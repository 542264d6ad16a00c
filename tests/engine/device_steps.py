"""One optimizer step of tiny models on a share of its rows; as a program, the further process of a test."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lorasmith.engine.models.families import read_decoder
from lorasmith.engine.reporting import SilentReporter
from lorasmith.engine.training.batches import plan_steps
from lorasmith.engine.training.checkpoints import Progress, trainable
from lorasmith.engine.training.choices import Choices
from lorasmith.engine.training.computation import Computation, PackedComputation, PeftComputation
from lorasmith.engine.training.devices import Devices, join
from lorasmith.engine.training.loop import TrainingRun, optimizer_step
from lorasmith.engine.training.loss import CompletionLoss
from lorasmith.engine.training.optimizers import build_optimizer
from lorasmith.errors import JobFailed
from lorasmith.schemas.training import TrainingSettings
from tests.engine.decoder_cases import adapted, random_rows, tiny_base
from tests.engine.small_memory import SmallMemory

CASES = [f"{way} {dtype}" for way in ("packed", "peft") for dtype in ("float32", "float64")]
LENGTHS = [33, 7, 61, 2, 18, 40, 5]  # the second of two processes has 33, 7, 2 and 40
SHORT, TOO_SHORT = 41, 20


@dataclass
class Step:
    """Loss in nats, gradients before clipping and weights after the first step, and how much was computed at once."""

    nats: float
    gradients: dict[str, Tensor]
    updated: dict[str, Tensor]
    at_once: int


def one_step(case: str, devices: Devices | None = None, *, tokens: int = 64, room: int | None = None) -> Step:
    """The first step of a run of one step of all rows; the last process has memory for `room` tokens."""
    devices = devices or Devices()
    way, dtype = case.split()
    dropout = 0.2 if way == "packed" else 0.0  # PEFT draws a mask for each micro-batch
    model = adapted(tiny_base("qwen2", tie_word_embeddings=False), dropout=dropout).to(getattr(torch, dtype))
    rows = random_rows(LENGTHS)
    computation: Computation
    if way == "packed":
        computation = PackedComputation(read_decoder(model), seed=0, micro_batch_tokens=tokens)
    else:
        loss = CompletionLoss(model.get_base_model(), 97)
        computation = PeftComputation(model, loss, seed=0, pad_id=0, precision="fp32", batch_rows=2)
    if room is not None and devices.rank == devices.count - 1:
        computation = SmallMemory(computation, room)  # type: ignore[assignment]
    gradients: dict[str, Tensor] = {}
    optimizer = build_optimizer("adamw", trainable(model), rate=1e-2, weight_decay=0.01)

    def keep(*_: object) -> None:
        gradients.update({n: p.grad.clone() for n, p in trainable(model).items() if p.grad is not None})

    optimizer.register_step_pre_hook(keep)
    with TemporaryDirectory() as kept:
        folder = Path(kept)
        run = TrainingRun(
            job=folder,
            model=model,
            optimizer=optimizer,
            initial={},
            computation=computation,
            plan=plan_steps(len(rows), batch_size=len(rows), accumulation=1, epochs=1, max_steps=None, seed=0),
            settings=TrainingSettings(max_grad_norm=1e9),
            train=rows,
            validation=[],
            progress=Progress(),
            choices=Choices(folder, SilentReporter(folder), devices),
            devices=devices,
        )
        optimizer_step(run, SilentReporter(folder), 1e-2)
    updated = {name: parameter.detach().clone() for name, parameter in trainable(model).items()}
    for name, first in run.devices.agree(updated).items():
        assert torch.equal(updated[name], first), f"{name} differs from the first process's"
    return Step(run.progress.interval_nats, gradients, updated, computation.at_once)


def short_of_memory(devices: Devices) -> tuple[Step, Step, str]:
    """A step that one process has too little memory for, one that is split so from the start, and one that cannot be."""
    short = one_step("packed float32", devices, room=SHORT)
    split = one_step("packed float32", devices, tokens=short.at_once)
    try:
        one_step("packed float32", devices, room=TOO_SHORT)
    except JobFailed as error:
        return short, split, error.message
    raise AssertionError("a row of 33 tokens was computed in a room for 20")


if __name__ == "__main__":
    joined = join(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    for name in CASES:
        one_step(name, joined)
    short_of_memory(joined)
    joined.gather(None)  # waits until it is killed
