"""The example of a support desk as a dataset, and a bicycle shop whose rows a teacher rewords."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorasmith.schemas.augmentation import AugmentationSpec
from lorasmith.schemas.data import DataImportSpec, Dataset
from lorasmith.schemas.jobs import Job
from lorasmith.services.augmentation import start_augmentation
from lorasmith.services.data_import import import_dataset
from lorasmith.services.workbench import Workbench
from tests.augmentation_jobs import GREETINGS, LOCAL, QUESTIONS, SYSTEM, Augment, question_of, run_job
from tests.services.import_cases import SUPPORT
from tests.teacher_stub import Reply, Stub, completion, serving


@pytest.fixture
def support(workbench: Workbench) -> Dataset:
    return import_dataset(workbench, SUPPORT, DataImportSpec(name="support", exact=True))


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(Stub()) as started:
        yield started


@pytest.fixture
def shop(workbench: Workbench, tmp_path: Path) -> Dataset:
    """Three rows in train and one in each other part, with system prompt and an earlier turn."""
    rows = [
        {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": GREETINGS[number + len(part) - 3]},
                {"role": "assistant", "content": "Hello!"},
                {"role": "user", "content": question},
                {"role": "assistant", "content": f"That is answer number {number} of the {part} part, as it stands."},
            ],
            "group": f"topic of {part} {number}",
            "split": part,
        }
        for part, questions in QUESTIONS.items()
        for number, question in enumerate(questions)
    ]
    file = tmp_path / "shop.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return import_dataset(workbench, file, DataImportSpec(name="shop"))


@pytest.fixture
def augment(workbench: Workbench, stub: Stub, shop: Dataset) -> Augment:
    """A job that has run, with texts by question from `texts` where there are some."""

    def make(texts: dict[str, list[str]] | None = None, **fields: Any) -> Job:
        if texts is not None:
            stub.rule = lambda request, before: Reply(body=completion({"texts": texts[question_of(request)]}))
        teacher = {"endpoint": stub.url, "model": "stub-model", "retry_base_s": 0.001, "max_attempts": 1}
        spec = {"data": "shop", "method": "rephrase", "teacher": teacher, **fields}
        job = start_augmentation(workbench, AugmentationSpec.model_validate(spec), LOCAL)
        return run_job(workbench, job)

    return make
