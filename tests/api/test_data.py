from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from lorasmith.schemas.data import Dataset, LedgerLine
from lorasmith.schemas.jobs import JobKind, JobStatus
from lorasmith.services import data
from lorasmith.services.data_removal import remove_dataset
from lorasmith.services.jobs import create_job
from lorasmith.services.workbench import Workbench
from tests.api.conftest import V1, rows

Add = Callable[..., Dataset]
DATASETS = f"{V1}/datasets"


def test_a_dataset_has_the_fields_of_the_design(client: TestClient, add_dataset: Add) -> None:
    dataset = add_dataset("sums")
    found = client.get(f"{DATASETS}/{dataset.id}").json()
    assert found["id"] == dataset.id
    assert (found["name"], found["format"], found["status"], found["num_examples"]) == ("sums", "alpaca", "ready", 20)
    assert found["file_path"] == f"datasets/{dataset.id}"
    assert found["part_sizes"] == dataset.part_sizes
    assert found["fates"]["kept"] == 20
    for name in ("description", "total_tokens", "created_at", "updated_at", "validation_errors", "statistics"):
        assert name in found


def test_pages_go_through_all_datasets_newest_first_though_more_come(client: TestClient, add_dataset: Add) -> None:
    added = [add_dataset(f"sums-{n}", rows(20 + n)) for n in range(5)]
    first = client.get(DATASETS, params={"limit": 2}).json()
    add_dataset("later", rows(30))
    rest = client.get(DATASETS, params={"limit": 10, "cursor": first["next_cursor"]}).json()
    seen = [one["name"] for one in first["data"] + rest["data"]]
    assert seen == [dataset.name for dataset in reversed(added)]
    assert rest["next_cursor"] is None


def test_a_list_is_filtered_by_name_format_and_status(client: TestClient, add_dataset: Add) -> None:
    add_dataset("sums")
    add_dataset("texts", '{"text": "one line"}\n{"text": "another line"}\n{"text": "a third"}\n')

    def names(**asked: str) -> list[str]:
        return [one["name"] for one in client.get(DATASETS, params=asked).json()["data"]]

    assert names(format="alpaca") == ["sums"]
    assert names(name="texts") == ["texts"]
    assert names(status="ready") == ["texts", "sums"]
    assert names(status="error") == []


def test_a_change_needs_the_state_that_it_changes(client: TestClient, add_dataset: Add, workbench: Workbench) -> None:
    dataset = add_dataset("sums")
    address = f"{DATASETS}/{dataset.id}"
    etag = client.get(address).headers["etag"]
    change = {"name": "additions", "description": "Sums by one"}
    assert client.put(address, json=change).status_code == 428
    changed = client.put(address, json=change, headers={"If-Match": etag})
    assert changed.status_code == 200
    stored = workbench.datasets.require("additions")
    assert (stored.id, stored.description) == (dataset.id, "Sums by one")
    assert client.get(address).headers["etag"] == changed.headers["etag"] != etag
    again = client.put(address, json={"name": "third"}, headers={"If-Match": etag})
    assert (again.status_code, again.json()["code"]) == (412, "changed")
    assert client.put(address, json={"name": "third"}, headers={"If-Match": "*"}).json()["description"] is None


def test_a_name_belongs_to_one_dataset(client: TestClient, add_dataset: Add) -> None:
    add_dataset("sums")
    other = add_dataset("others", rows(25))
    answer = client.put(f"{DATASETS}/{other.id}", json={"name": "sums"}, headers={"If-Match": "*"})
    assert (answer.status_code, answer.json()["code"]) == (409, "conflict")
    assert client.get(f"{DATASETS}/{other.id}").json()["name"] == "others"


def test_a_removed_dataset_is_gone_from_list_and_disk(
    client: TestClient, add_dataset: Add, workbench: Workbench
) -> None:
    dataset = add_dataset("sums")
    assert client.delete(f"{DATASETS}/{dataset.id}", headers={"If-Match": '"other"'}).status_code == 412
    assert client.delete(f"{DATASETS}/{dataset.id}").status_code == 204
    assert client.get(f"{DATASETS}/{dataset.id}").status_code == 404
    assert client.get(DATASETS).json()["data"] == []
    assert not workbench.path(dataset.folder).exists()


def test_a_dataset_that_a_job_reads_stays(client: TestClient, add_dataset: Add, workbench: Workbench) -> None:
    dataset = add_dataset("sums")
    job = create_job(workbench, JobKind.TRAINING, "t", {"data": "sums"}, {"dataset_id": dataset.id})
    answer = client.delete(f"{DATASETS}/{dataset.id}", params={"force": True})
    assert answer.status_code == 409
    assert job.id in answer.json()["detail"]
    job.status = JobStatus.FAILED
    workbench.jobs.replace(job)
    kept = client.delete(f"{DATASETS}/{dataset.id}")
    assert kept.status_code == 409
    assert "is used by job t" in kept.json()["detail"]
    assert workbench.path(dataset.folder).exists()
    assert client.delete(f"{DATASETS}/{dataset.id}", params={"force": True}).status_code == 204
    assert not workbench.path(dataset.folder).exists()


def test_preview_and_statistics_are_those_of_the_stored_rows(client: TestClient, add_dataset: Add) -> None:
    dataset = add_dataset("sums")
    train = dataset.part_sizes["train"]
    first = client.get(f"{DATASETS}/sums/preview", params={"limit": 3}).json()
    assert (first["total"], len(first["examples"])) == (train, 3)
    assert first["examples"][0]["messages"][-1]["role"] == "assistant"
    last = client.get(f"{DATASETS}/sums/preview", params={"limit": 100, "offset": train - 1}).json()
    assert len(last["examples"]) == 1
    statistics = client.get(f"{DATASETS}/sums/statistics").json()
    assert statistics["num_examples"] == 20
    assert statistics["statistics"]["turns"] == {"mean": 2.0, "max": 2}


def test_the_ledger_says_what_became_of_each_row(client: TestClient, add_dataset: Add) -> None:
    add_dataset("sums", rows(10) + rows(10))
    page = client.get(f"{DATASETS}/sums/ledger", params={"limit": 15}).json()
    rest = client.get(f"{DATASETS}/sums/ledger", params={"cursor": page["next_cursor"]}).json()
    lines = page["data"] + rest["data"]
    assert [line["row"] for line in lines] == list(range(1, 21))
    assert [line["fate"] for line in lines] == ["kept"] * 10 + ["exact_duplicate"] * 10
    duplicates = client.get(f"{DATASETS}/sums/ledger", params={"fate": "exact_duplicate"}).json()["data"]
    assert [line["duplicate_of_row"] for line in duplicates] == list(range(1, 11))
    sent = client.get(f"{DATASETS}/sums/ledger/file")
    assert [LedgerLine.model_validate_json(line) for line in sent.text.splitlines()] == [
        LedgerLine.model_validate(line) for line in lines
    ]
    assert sent.headers["content-disposition"].endswith('-ledger.jsonl"')
    refused = client.get(f"{DATASETS}/sums/ledger", params={"fate": "cut"})
    assert refused.status_code == 422
    assert refused.json()["detail"] == "rows are cut when a model is trained on them"


def test_validating_finds_changed_files_and_unwanted_rows(
    client: TestClient, add_dataset: Add, workbench: Workbench
) -> None:
    dataset = add_dataset("sums", rows(20) + '{"instruction": "key?", "output": "AKIAIOSFODNN7EXAMPLE"}\n')
    sound = client.post(f"{DATASETS}/sums/validate", json={}).json()
    assert (sound["passes"], sound["rows"], sound["counts"]) == (True, 21, {"secret": 1})
    assert sound["findings"][0]["row"] == 21
    strict = client.post(f"{DATASETS}/sums/validate", json={"reject": ["secret"]}).json()
    assert strict["passes"] is False
    with (workbench.path(dataset.folder) / "train.jsonl").open("a") as file:
        file.write("\n")
    damaged = client.post(f"{DATASETS}/sums/validate", json={}).json()
    assert damaged["passes"] is False
    assert "train.jsonl does not match its checksum" in damaged["validation_errors"][0]
    assert str(workbench.home) not in str(damaged)


def test_a_conversion_writes_a_file_with_all_rows(client: TestClient, add_dataset: Add, workbench: Workbench) -> None:
    add_dataset("sums")
    answer = client.post(f"{DATASETS}/convert", json={"dataset_id": "sums", "format": "sharegpt"})
    assert answer.status_code == 201, answer.text
    made = client.get(answer.headers["location"]).json()
    assert (made["written"], made["left_out"]) == (20, {})
    sent = client.get(f"{answer.headers['location']}/file")
    assert sent.content == workbench.path(made["file_path"]).read_bytes()
    assert len(sent.text.splitlines()) == 20
    assert "conversations" in sent.text.splitlines()[0]
    assert client.delete(answer.headers["location"]).status_code == 204
    assert client.get(answer.headers["location"]).status_code == 404


def test_rows_that_the_format_cannot_hold_stop_a_conversion(
    client: TestClient, add_dataset: Add, workbench: Workbench
) -> None:
    add_dataset("texts", '{"text": "one line"}\n{"text": "another line"}\n{"text": "a third"}\n')
    answer = client.post(f"{DATASETS}/convert", json={"dataset_id": "texts", "format": "chatml"})
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_data")
    assert list(workbench.path("exports").iterdir()) == []


@pytest.mark.parametrize("what", ["preview", "ledger", "convert", "validate"])
def test_what_is_removed_while_it_is_read_is_not_found(
    what: str, client: TestClient, add_dataset: Add, workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = add_dataset("sums")

    def look_then_remove(path: Path, looked_for: Dataset) -> Path:
        remove_dataset(workbench, dataset.id)
        return path

    monkeypatch.setattr(data, "require_stored", look_then_remove)
    asked = {"convert": {"dataset_id": dataset.id, "format": "chat", "file_type": "jsonl"}, "validate": {}}
    if what == "convert":
        answer = client.post(f"{DATASETS}/convert", json=asked[what])
    elif what == "validate":
        answer = client.post(f"{DATASETS}/{dataset.id}/validate", json=asked[what])
    else:
        answer = client.get(f"{DATASETS}/{dataset.id}/{what}")
    assert answer.status_code == 404, answer.text
    assert answer.json()["detail"] == "the dataset 'sums' has been removed meanwhile"
