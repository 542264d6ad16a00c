"""The official `openai` client, unchanged, against a real server: what it sends, and what it reads."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from lorasmith.schemas.jobs import Job, JobStatus
from lorasmith.services.workbench import Workbench


@pytest.fixture
def sdk(app: FastAPI) -> Iterator[OpenAI]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    with OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=app.state.credentials.token.value) as client:
        yield client
    server.should_exit = True
    thread.join()


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    turns = (({"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": str(n)}) for n in range(12))
    path.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in turns), encoding="utf-8")
    return path


def test_a_file_is_uploaded_listed_read_back_and_removed(sdk: OpenAI, workbench: Workbench, examples: Path) -> None:
    with examples.open("rb") as content:
        file = sdk.files.create(file=content, purpose="fine-tune")
    assert (file.object, file.filename, file.bytes) == ("file", "examples.jsonl", examples.stat().st_size)
    assert sdk.files.wait_for_processing(file.id).status == "processed"
    assert [one.id for one in sdk.files.list(purpose="fine-tune")] == [file.id]
    assert sdk.files.content(file.id).read() == examples.read_bytes()
    dataset = workbench.datasets.list()[0]
    assert dataset.part_sizes == {"train": 12, "val": 0, "test": 0}, "each row is for training"
    assert sdk.files.delete(file.id).deleted
    assert workbench.datasets.list() == []
    with pytest.raises(openai.NotFoundError, match="no such file"):
        sdk.files.retrieve(file.id)


def test_a_job_is_created_listed_paused_resumed_and_cancelled(
    sdk: OpenAI, workbench: Workbench, examples: Path
) -> None:
    file = sdk.files.create(file=examples, purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(
        model="starter",
        training_file=file.id,
        validation_file=file.id,
        suffix="my tune",
        seed=7,
        metadata={"team": "support"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 3, "learning_rate_multiplier": 0.5}},
        },
    )
    assert (job.object, job.status, job.model, job.seed) == ("fine_tuning.job", "queued", "starter", 7)
    assert (job.training_file, job.metadata) == (file.id, {"team": "support"})
    stored = workbench.jobs.list()[0]
    training = stored.spec["training"]
    assert (training["num_epochs"], training["batch_size"], training["gradient_accumulation_steps"]) == (2, 3, 1)
    assert training["learning_rate"] == 1e-4
    assert stored.name.startswith("my-tune-")
    other = sdk.fine_tuning.jobs.create(model="starter", training_file=file.id)
    assert [one.id for one in sdk.fine_tuning.jobs.list(limit=1)] == [other.id, job.id], "its cursor pages through all"
    filtered = sdk.fine_tuning.jobs.list(extra_query={"metadata[team]": "support"})
    assert [one.id for one in filtered] == [job.id]
    assert sdk.fine_tuning.jobs.pause(job.id).status == "paused"
    assert sdk.fine_tuning.jobs.resume(job.id).status == "queued"
    assert sdk.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert sdk.fine_tuning.jobs.retrieve(job.id).finished_at is not None
    with pytest.raises(openai.ConflictError, match="is used by job"):
        sdk.files.delete(file.id)


def test_events_are_paged_from_the_newest_back(sdk: OpenAI, workbench: Workbench, examples: Path) -> None:
    file = sdk.files.create(file=examples, purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model="starter", training_file=file.id)
    stored = workbench.jobs.list()[0]
    with (workbench.path(stored.folder) / "events.jsonl").open("w", encoding="utf-8") as events:
        for seq in range(1, 46):
            data = {"step": seq, "total_steps": 45, "loss": 1.5, "eta_s": 9.0}
            events.write(json.dumps({"seq": seq, "time": "2026-01-01T00:00:00Z", "type": "step", "data": data}) + "\n")
    found = list(sdk.fine_tuning.jobs.list_events(job.id, limit=10))
    assert [event.data["step"] for event in found] == list(range(45, 0, -1))  # type: ignore[index]
    assert (found[0].type, found[0].message) == ("metrics", "Step 45/45: training loss=1.50")
    assert sdk.fine_tuning.jobs.retrieve(job.id).estimated_finish is not None


def test_a_retry_of_the_client_is_one_job(sdk: OpenAI, workbench: Workbench, examples: Path) -> None:
    file = sdk.files.create(file=examples, purpose="fine-tune")
    asked = {"model": "starter", "training_file": file.id}
    first = sdk.fine_tuning.jobs.create(**asked)  # type: ignore[arg-type]
    again = sdk.fine_tuning.jobs.create(**asked, extra_headers={"x-stainless-retry-count": "1"})  # type: ignore[arg-type]
    assert again.id == first.id
    assert sdk.fine_tuning.jobs.create(**asked).id != first.id, "asked a second time, not retried"  # type: ignore[arg-type]
    assert len(workbench.jobs.list()) == 2


@pytest.mark.parametrize(
    ("asked", "error", "param", "text"),
    [
        ({"model": "gpt-4o-mini"}, openai.NotFoundError, None, "no model 'gpt-4o-mini'"),
        ({"training_file": "file-nope"}, openai.NotFoundError, None, "no such file"),
        ({"seed": -1}, openai.BadRequestError, "seed", "greater than or equal to 0"),
        ({"suffix": ""}, openai.BadRequestError, "suffix", "at least 1 character"),
        ({"integrations": [{"type": "wandb"}]}, openai.BadRequestError, "integrations", "at most 0 items"),
        ({"method": {"type": "dpo"}}, openai.BadRequestError, "method.type", "'supervised'"),
    ],
)
def test_errors_are_those_of_the_client(
    sdk: OpenAI, examples: Path, asked: dict[str, object], error: type[openai.APIStatusError], param: str, text: str
) -> None:
    file = sdk.files.create(file=examples, purpose="fine-tune")
    with pytest.raises(error) as raised:
        sdk.fine_tuning.jobs.create(**{"model": "starter", "training_file": file.id, **asked})  # type: ignore[arg-type]
    assert text in raised.value.message
    assert raised.value.param == param  # type: ignore[attr-defined]


def test_a_file_that_is_no_dataset_says_why(sdk: OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"mess\n', encoding="utf-8")
    file = sdk.files.create(file=path, purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="training_file .* is no dataset: "):
        sdk.fine_tuning.jobs.create(model="starter", training_file=file.id)
    found = sdk.files.retrieve(file.id)
    assert found.status == "error"
    assert found.status_details
    with pytest.raises(openai.AuthenticationError):
        sdk.with_options(api_key="wrong").files.list()


def test_a_failed_job_has_an_error(sdk: OpenAI, workbench: Workbench, examples: Path) -> None:
    file = sdk.files.create(file=examples, purpose="fine-tune")
    job = sdk.fine_tuning.jobs.create(model="starter", training_file=file.id)

    def fail(row: Job) -> None:
        row.status, row.reason_code, row.reason = JobStatus.FAILED, "non_finite", "the loss is not finite"

    workbench.jobs.change(workbench.jobs.list()[0].id, fail)
    error = sdk.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None
    assert (error.code, error.message) == ("non_finite", "the loss is not finite")
    with pytest.raises(openai.ConflictError, match="is failed, so it cannot cancel"):
        sdk.fine_tuning.jobs.cancel(job.id)
    assert sdk.fine_tuning.jobs.retrieve(job.id).error == error
