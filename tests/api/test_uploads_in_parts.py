"""Uploads that outlive a request: sent in parts, taken up by a restarted server, and removed meanwhile."""

from __future__ import annotations

import hashlib
import os
import time
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from lorasmith.api import datasets
from lorasmith.api.app import create_app
from lorasmith.api.routes import uploads as routes
from lorasmith.schemas.data import DataImportSpec
from lorasmith.schemas.uploads import DatasetStatus, Upload
from lorasmith.services import uploads
from lorasmith.services.data_removal import remove_dataset
from lorasmith.services.uploads import begin_upload, find_upload, finish_upload, import_upload, save_outcome
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings
from tests.api.conftest import BASE, V1, rows
from tests.api.upload_cases import DATASETS, nothing_is_left, send

UPLOADS = f"{V1}/uploads"


def begin(client: TestClient, content: bytes, **fields: Any) -> str:
    asked = {"name": "sums", "file_name": "rows.jsonl", "size_bytes": len(content), **fields}
    answer = client.post(UPLOADS, json=asked)
    assert answer.status_code == 201, answer.text
    location: str = answer.headers["location"]
    return location


def fill(client: TestClient, upload: str, content: bytes, offset: int) -> httpx.Response:
    headers = {"Upload-Offset": str(offset), "Content-Type": "application/octet-stream"}
    return client.patch(upload, content=content, headers=headers)


def until_settled(client: TestClient, dataset: str) -> dict[str, Any]:
    ends = time.monotonic() + 120
    while (found := client.get(dataset).json())["status"] in ("processing", "uploading"):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return dict(found)


def test_an_upload_in_parts_goes_on_where_it_stands(client: TestClient) -> None:
    content = rows(50).encode()
    upload = begin(client, content)
    assert client.get(upload).json()["offset"] == 0
    half = fill(client, upload, content[:700], 0)
    assert (half.status_code, half.headers["upload-offset"]) == (200, "700")
    assert client.get(DATASETS).json()["data"][0]["status"] == "uploading"
    wrong = fill(client, upload, content, 0)
    assert (wrong.status_code, wrong.json()["hint"]) == (409, "Upload-Offset: 700")
    early = client.post(f"{upload}/complete", json={})
    assert (early.status_code, early.json()["hint"]) == (409, "send the rest from Upload-Offset 700 on")
    assert fill(client, upload, content[700:], 700).json()["offset"] == len(content)
    done = client.post(f"{upload}/complete", json={"sha256": hashlib.sha256(content).hexdigest()})
    assert done.status_code == 202
    assert until_settled(client, done.headers["location"])["status"] == "ready"
    assert client.get(UPLOADS).json() == []
    assert fill(client, upload, b"more", len(content)).status_code == 409


def test_more_bytes_than_announced_are_refused_and_the_earlier_ones_stay(client: TestClient) -> None:
    upload = begin(client, b"x" * 100)
    fill(client, upload, b"x" * 60, 0)
    assert fill(client, upload, b"x" * 41, 60).status_code == 413
    assert client.get(upload).json()["offset"] == 60
    assert client.delete(upload).status_code == 204
    assert client.get(upload).status_code == 404


def test_bytes_that_changed_on_the_way_are_noticed(client: TestClient, workbench: Workbench) -> None:
    upload = begin(client, b"x" * 10)
    fill(client, upload, b"x" * 10, 0)
    answer = client.post(f"{upload}/complete", json={"sha256": "0" * 64})
    assert answer.status_code == 422
    assert "sha256" in answer.json()["detail"]
    assert workbench.datasets.list() == []


def test_two_uploads_do_not_take_one_name(client: TestClient) -> None:
    begin(client, b"x" * 10)
    answer = client.post(UPLOADS, json={"name": "sums", "file_name": "b.jsonl", "size_bytes": 5})
    assert answer.status_code == 409
    assert "there is already a dataset named 'sums'" in answer.json()["detail"]


def test_a_file_that_does_not_fit_on_the_disk_is_refused_before_it_is_sent(workbench: Workbench) -> None:
    app = create_app(workbench, ServerSettings(max_upload_bytes=2**60))
    with TestClient(app, base_url=BASE) as client:
        client.headers["Authorization"] = f"Bearer {app.state.credentials.token.value}"
        answer = client.post(UPLOADS, json={"name": "sums", "file_name": "b.jsonl", "size_bytes": 2**52})
    assert (answer.status_code, answer.json()["code"]) == (507, "disk_full")


def test_a_restarted_server_goes_on_with_an_import(workbench: Workbench) -> None:
    upload = begin_upload(workbench, "rows.jsonl", None, DataImportSpec(name="sums"))
    workbench.path(upload.content).write_text(rows(20), encoding="utf-8")
    finish_upload(workbench, upload)
    left = workbench.path(f"datasets/{upload.id}")
    left.mkdir(parents=True)  # as a crash between the folder and its row leaves it
    (left / "train.jsonl").write_text("half")
    app = create_app(workbench, ServerSettings())
    with TestClient(app, base_url=BASE) as client:
        client.headers["Authorization"] = f"Bearer {app.state.credentials.token.value}"
        assert until_settled(client, f"{DATASETS}/{upload.id}")["num_examples"] == 20


def test_a_starting_server_removes_what_a_killed_one_was_receiving_and_what_is_stale(workbench: Workbench) -> None:
    kept = begin_upload(workbench, "a.jsonl", 10, DataImportSpec(name="kept"))
    stale = begin_upload(workbench, "b.jsonl", 10, DataImportSpec(name="stale"))
    long_ago = time.time() - 8 * 24 * 3600
    os.utime(workbench.path(stale.content), (long_ago, long_ago))
    received = workbench.path("uploads") / ".staging-incoming_1"
    received.write_bytes(b"half")
    with TestClient(create_app(workbench, ServerSettings()), base_url=BASE):
        pass
    assert not received.exists()
    assert find_upload(workbench, stale.id) is None
    assert find_upload(workbench, kept.id) == kept


def test_the_command_line_removes_the_uploaded_file_with_its_dataset(client: TestClient, workbench: Workbench) -> None:
    send(client, rows(5))
    remove_dataset(workbench, "sums")
    assert nothing_is_left(workbench)


def test_a_stopped_server_leaves_the_import_for_the_next_one(workbench: Workbench) -> None:
    upload = begin_upload(workbench, "rows.jsonl", None, DataImportSpec(name="sums"))
    workbench.path(upload.content).write_text(rows(40_000), encoding="utf-8")
    finish_upload(workbench, upload)
    app = create_app(workbench, ServerSettings())
    with TestClient(app, base_url=BASE):
        pass
    stopped = find_upload(workbench, upload.id)
    assert stopped is not None
    assert stopped.status is DatasetStatus.PROCESSING
    assert workbench.datasets.list() == []


def test_a_dataset_can_be_removed_as_soon_as_it_is_shown_as_ready(
    client: TestClient, workbench: Workbench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    removed: list[int] = []

    def remove_then_save(
        workbench: Workbench, upload: Upload, status: DatasetStatus, problem: str | None = None
    ) -> None:
        assert client.get(f"{DATASETS}/{upload.id}").json()["status"] == "ready"
        removed.append(client.delete(f"{DATASETS}/{upload.id}").status_code)
        save_outcome(workbench, upload, status, problem)

    monkeypatch.setattr(uploads, "save_outcome", remove_then_save)
    sent = client.post(DATASETS, data={"name": "sums"}, files={"file": ("a.jsonl", rows(5))})
    ends = time.monotonic() + 30
    while not removed and time.monotonic() < ends:
        time.sleep(0.01)
    assert removed == [204]
    assert client.get(sent.headers["location"]).status_code == 404
    assert client.get(DATASETS).json()["data"] == []
    assert list(workbench.path("uploads").iterdir()) == []
    assert caplog.text == ""


def waiting_upload(workbench: Workbench) -> Upload:
    upload = begin_upload(workbench, "a.jsonl", None, DataImportSpec(name="sums"))
    workbench.path(upload.content).write_text(rows(5), encoding="utf-8")
    return finish_upload(workbench, upload)


def test_a_dataset_whose_import_ends_while_it_is_removed_is_removed_whole_or_not_at_all(
    client: TestClient, workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, show = waiting_upload(workbench), datasets.show

    def show_before_its_end(workbench: Workbench, dataset_id: str) -> Any:
        shown = show(workbench, dataset_id)
        import_upload(workbench, upload, lambda: False)
        return shown

    with monkeypatch.context() as patched:
        patched.setattr(datasets, "show", show_before_its_end)
        assert client.delete(f"{DATASETS}/{upload.id}").status_code == 409
    assert client.get(f"{DATASETS}/{upload.id}").json()["file_name"] == "a.jsonl"
    assert client.delete(f"{DATASETS}/{upload.id}").status_code == 204


def test_an_upload_that_was_removed_before_it_is_tried_again_stays_removed(workbench: Workbench) -> None:
    upload = waiting_upload(workbench)
    upload.problem = "it is tried again: the disk is full"
    uploads.save(workbench, upload)
    uploads.remove_upload(workbench, upload)
    assert import_upload(workbench, upload, lambda: False) is None
    assert list(workbench.path("uploads").iterdir()) == []


def test_an_upload_is_not_removed_while_bytes_are_added(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"name": "sums", "file_name": "a.jsonl", "size_bytes": 10}
    place = client.post(UPLOADS, json=asked).headers["location"]
    removed: list[int] = []

    def require_then_remove(workbench: Workbench, upload_id: str) -> Upload:
        found = uploads.require_upload(workbench, upload_id)
        if not removed:
            removed.append(0)
            removed[0] = client.delete(place).status_code
        return found

    monkeypatch.setattr(routes, "require_upload", require_then_remove)
    answer = client.patch(place, content=b"12345", headers={"Upload-Offset": "0"})
    assert (answer.status_code, removed) == (200, [409])
    assert answer.headers["Upload-Offset"] == "5"
