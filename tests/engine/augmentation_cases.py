"""Folders of augmentation jobs, and what a job has written into one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lorasmith.engine.augmentation import run
from lorasmith.engine.augmentation.rows import ROWS
from lorasmith.engine.reporting import Reporter
from lorasmith.files import write_json
from lorasmith.schemas.augmentation import (
    AugmentationInputs,
    AugmentationResult,
    AugmentationSpec,
)
from lorasmith.schemas.data import Example, Message
from lorasmith.schemas.jobs import JobKind, JobOrder
from lorasmith.schemas.teachers import Reach
from tests.teacher_stub import Stub


def example(number: int, question: str | None = None) -> Example:
    asked = question or f"What does item {number} cost in the shop of street {number}?"
    messages = [Message(role="user", content=asked), Message(role="assistant", content=f"It costs {number} euros.")]
    return Example(id=f"{number:016x}", group=f"g{number}", row=number, messages=messages)


def job(folder: Path, stub: Stub, examples: list[Example], **fields: Any) -> Path:
    """A job folder; `teacher` holds fields of the teacher."""
    folder.mkdir()
    train = folder / "train.jsonl"
    train.write_text("".join(one.model_dump_json(exclude_none=True) + "\n" for one in examples), encoding="utf-8")
    teacher = {
        "endpoint": stub.url,
        "model": "stub",
        "retry_base_s": 0.001,
        "max_attempts": 2,
        **fields.pop("teacher", {}),
    }
    spec = AugmentationSpec.model_validate({"data": "d", "method": "rephrase", "teacher": teacher, **fields})
    inputs = AugmentationInputs(
        dataset_id="dataset_1", dataset_name="d", dataset_sha256="0", train_file=str(train), reach=Reach(loopback=True)
    )
    order = JobOrder(
        id="job_1",
        kind=JobKind.AUGMENTATION,
        spec=spec.model_dump(mode="json"),
        inputs=inputs.model_dump(mode="json"),
    )
    write_json(folder / "job.json", order.model_dump(mode="json"))
    return folder


def run_here(folder: Path) -> AugmentationResult:
    order = JobOrder.model_validate_json((folder / "job.json").read_text(encoding="utf-8"))
    return run.run(order, folder, Reporter(folder))


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines alone."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def rows_of(folder: Path) -> dict[int, dict[str, Any]]:
    return {line["row"]: line for line in lines(folder / ROWS)}
