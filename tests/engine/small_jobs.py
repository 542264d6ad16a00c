"""Rows and runs that several engine tests share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.run import run
from lorasmith.errors import Interrupted
from lorasmith.schemas.data import Example, Message
from lorasmith.schemas.jobs import JobOrder


def counting_examples(count: int, first: int = 0) -> list[Example]:
    """`Count from n.` → `n, n + 1, …`: rows of several lengths."""
    rows = []
    for index in range(first, first + count):
        answer = ", ".join(str(index + step) for step in range(1 + index % 5))
        messages = [Message(role="user", content=f"Count from {index}."), Message(role="assistant", content=answer)]
        rows.append(Example(id=f"{index:016x}", group=str(index), row=index + 1, messages=messages))
    return rows


def write_examples(path: Path, examples: list[Example]) -> Path:
    path.write_text(
        "".join(example.model_dump_json(exclude_none=True) + "\n" for example in examples), encoding="utf-8"
    )
    return path


def run_engine(folder: Path) -> dict[str, Any]:
    """Run a training job folder in this process, as `python -m lorasmith.engine` does in its own."""
    order = JobOrder.model_validate_json((folder / "job.json").read_text(encoding="utf-8"))
    return run(order, folder, Reporter(folder)).model_dump()


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [line["data"] for line in map(json.loads, lines) if line["type"] == kind]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the adapter that a job made."""
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def stop_at_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask the runs in this process to stop when they have logged that step."""

    class Stops(Reporter):
        def __call__(self, type: str, **data: Any) -> None:
            super().__call__(type, **data)
            if type == "step" and data["step"] == step:
                self.stop_requested = True

    monkeypatch.setattr("tests.engine.small_jobs.Reporter", Stops)


def stop_and_resume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    with monkeypatch.context() as patched, pytest.raises(Interrupted, match="stopped after step 5"):
        stop_at_step(5, patched)
        run_engine(folder)
    return run_engine(folder)


def tie_ends(model_folder: Path, folder: Path) -> Path:
    """A copy of a model whose output head is its embedding."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    model.lm_head.weight = model.model.embed_tokens.weight
    model.config.tie_word_embeddings = True
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder
