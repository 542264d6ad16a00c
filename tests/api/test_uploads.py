"""Files that come over the network, as they come: cut off, too long, of the wrong kind, with names that mean harm."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
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

DATASETS, UPLOADS = f"{V1}/datasets", f"{V1}/uploads"
WAIT = {"Prefer": "wait=60"}


def send(
    client: TestClient, content: bytes | str, file_name: str = "rows.jsonl", headers: Any = None, **fields: str
) -> httpx.Response:
    data = {"name": "sums", **fields}
    return client.post(DATASETS, data=data, files={"file": (file_name, content)}, headers={**WAIT, **(headers or {})})


def nothing_is_left(workbench: Workbench) -> bool:
    uploads = workbench.path("uploads")
    return workbench.datasets.list() == [] and (not uploads.exists() or list(uploads.iterdir()) == [])


def test_an_uploaded_file_becomes_a_dataset(client: TestClient, workbench: Workbench) -> None:
    content = rows(20).encode()
    answer = send(client, content, description="Sums", options=json.dumps({"split": [0.5, 0.25, 0.25]}))
    assert answer.status_code == 202
    assert answer.headers["preference-applied"] == "wait=60"
    found = client.get(answer.headers["location"]).json()
    assert (found["status"], found["name"], found["description"]) == ("ready", "sums", "Sums")
    assert found["source_sha256"] == hashlib.sha256(content).hexdigest()
    assert found["file_name"] == "rows.jsonl"
    stored = workbench.datasets.require("sums")
    assert stored.id == found["id"] == answer.json()["id"]
    assert stored.spec is not None
    assert stored.spec.split == (0.5, 0.25, 0.25)
    preview = client.get(f"{DATASETS}/sums/preview", params={"limit": 1}).json()
    assert preview["examples"][0]["messages"][0]["content"].startswith("Add 1 to")
    assert client.delete(answer.headers["location"]).status_code == 204
    assert nothing_is_left(workbench)


def test_rows_that_cannot_be_used_are_an_error_that_names_file_and_row_and_no_path(
    client: TestClient, workbench: Workbench
) -> None:
    found = send(client, rows(3) + '{"instruction": "What?"}\n').json()
    assert found["status"] == "error"
    (problem,) = found["validation_errors"]
    assert "1 of 4 rows of rows.jsonl cannot be used" in problem
    assert "rows.jsonl:4: row 4" in problem
    assert str(workbench.home) not in json.dumps(found)
    listed = client.get(DATASETS, params={"status": "error"}).json()["data"]
    assert [one["id"] for one in listed] == [found["id"]]
    assert client.get(f"{DATASETS}/{found['id']}/preview").status_code == 404
    again = send(client, rows(3))
    assert (again.status_code, again.json()["code"]) == (409, "conflict")
    assert client.delete(f"{DATASETS}/{found['id']}").status_code == 204
    assert nothing_is_left(workbench)
    assert send(client, rows(3)).json()["status"] == "ready"


@pytest.mark.parametrize(
    ("content", "file_name", "status"),
    [
        (b"\xef\xbb\xbf" + rows(5).encode(), "bom.jsonl", "ready"),
        (rows(5).replace("\n", "\r\n").encode(), "crlf.jsonl", "ready"),
        ("instruction,output\nSay é.,é\nSay a.,a\n".encode("utf-16"), "utf16.csv", "ready"),
        (b'{"instruction": "x", "output": "\xff\xfe"}\n', "latin.jsonl", "error"),
        (b"\x89PNG\r\n\x1a\n" + b"\x00" * 100, "image.jsonl", "error"),
        (b"[" * 10_000, "nested.json", "error"),
        (b'{"instruction": "a", "output": NaN}\n', "nan.jsonl", "error"),
        (b" \n\n", "blank.jsonl", "error"),
    ],
)
def test_odd_content_ends_as_ready_or_as_an_error(
    content: bytes, file_name: str, status: str, client: TestClient
) -> None:
    answer = send(client, content, file_name)
    assert answer.status_code == 202
    assert answer.json()["status"] == status, answer.text
    assert (answer.json()["validation_errors"] not in (None, [])) is (status == "error")


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd.jsonl",
        "..\\..\\windows.jsonl",
        "/etc/cron.d/rows.jsonl",
        "-rf.jsonl",
        "rows\u202elnosj.jsonl",
        "line\nbreak.jsonl",
        "\N{FAMILY}\u200d.jsonl",
        "x" * 300 + ".jsonl",
        "CON.jsonl",
        "$(id);id.jsonl",
    ],
)
def test_a_file_name_names_nothing_on_the_disk(
    name: str, client: TestClient, workbench: Workbench, tmp_path: Path
) -> None:
    before = set(tmp_path.rglob("*"))
    found = send(client, rows(5), name).json()
    assert found["status"] == "ready", found
    shown = found["file_name"]
    assert shown.isprintable()
    assert "/" not in shown
    assert len(shown) <= 255
    new = {path.relative_to(workbench.home) for path in set(tmp_path.rglob("*")) - before if path.is_file()}
    assert {path.parts[0] for path in new} <= {
        "uploads",
        "datasets",
        "lorasmith.db",
        "lorasmith.db-wal",
        "lorasmith.db-shm",
    }
    assert {path.name for path in new if path.parts[0] == "uploads"} == {"content.jsonl", "imported.json"}


@pytest.mark.parametrize(
    ("file_name", "content", "fields", "status", "words"),
    [
        ("rows.jsonl", b"", {}, 422, "'rows.jsonl' is empty"),
        ("rows.exe", b"x", {}, 422, "has the extension '.exe'"),
        ("rows.zip", b"x", {}, 422, "has the extension '.zip'"),
        ("model.pkl", b"x", {}, 422, "has the extension '.pkl'"),
        ("\x00.jsonl", b"", {}, 422, "is empty"),
        ("rows.jsonl", b"x", {"name": "../x"}, 422, "name: String should match pattern"),
        ("rows.jsonl", b"x", {"colour": "red"}, 422, "the form has a field 'colour'"),
        ("rows.jsonl", b"x", {"options": "{"}, 422, "`options` is not valid JSON"),
        ("rows.jsonl", b"x", {"options": '{"tokenizer": "/etc"}'}, 404, "no model '/etc'"),
        ("rows.jsonl", b"x", {"options": '{"splt": [1, 0, 0]}'}, 422, "did you mean 'split'?"),
        ("rows.jsonl", b"x", {"format": "excel"}, 422, "format"),
        ("rows.jsonl", b"x" * 1_000_001, {}, 413, "the file is longer than the limit of 1000000 bytes"),
    ],
)
def test_what_is_refused_leaves_nothing(
    file_name: str,
    content: bytes,
    fields: dict[str, str],
    status: int,
    words: str,
    client: TestClient,
    workbench: Workbench,
) -> None:
    answer = send(client, content, file_name, **fields)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"] or status == 413
    assert nothing_is_left(workbench)


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b"--b\r\n", "multipart/form-data; boundary=b", "breaks off"),
        (
            b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
            "has no file",
        ),
        (b"no form at all", "multipart/form-data; boundary=b", "the form is broken"),
        (b"{}", "application/json", "uploaded as multipart/form-data"),
        (b"", "multipart/form-data", "uploaded as multipart/form-data"),
    ],
)
def test_a_broken_form_is_named(
    body: bytes, content_type: str, words: str, client: TestClient, workbench: Workbench
) -> None:
    answer = client.post(DATASETS, content=body, headers={"Content-Type": content_type})
    assert answer.status_code == 422
    assert words in answer.json()["detail"]
    assert nothing_is_left(workbench)


def test_a_body_without_a_length_is_stopped_at_the_limit(client: TestClient, workbench: Workbench) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'

    def pieces() -> Iterator[bytes]:
        yield head
        for _ in range(200):
            yield b"x" * 10_000

    answer = client.post(DATASETS, content=pieces(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
    assert nothing_is_left(workbench)


def test_a_connection_that_breaks_leaves_nothing(app: FastAPI, client: TestClient, workbench: Workbench) -> None:
    async def broken() -> None:
        head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\nabc'
        messages = iter([{"type": "http.request", "body": head, "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def ignore(message: Any) -> None:
            pass

        token = app.state.credentials.token.value.encode()
        headers = [(b"host", b"localhost"), (b"authorization", b"Bearer " + token)]
        headers.append((b"content-type", b"multipart/form-data; boundary=b"))
        scope = {
            "type": "http",
            "method": "POST",
            "path": DATASETS,
            "raw_path": b"",
            "query_string": b"",
            "headers": headers,
        }
        await app({**scope, "http_version": "1.1", "scheme": "http", "root_path": "", "asgi": {"version": "3.0"}, "client": None, "server": None}, receive, ignore)  # fmt: skip

    asyncio.run(broken())
    assert nothing_is_left(workbench)


def begin(client: TestClient, content: bytes, **fields: Any) -> str:
    asked = {"name": "sums", "file_name": "rows.jsonl", "size_bytes": len(content), **fields}
    answer = client.post(UPLOADS, json=asked)
    assert answer.status_code == 201, answer.text
    location: str = answer.headers["location"]
    return location


def fill(client: TestClient, upload: str, content: bytes, offset: int) -> httpx.Response:
    headers = {"Upload-Offset": str(offset), "Content-Type": "application/octet-stream"}
    return client.patch(upload, content=content, headers=headers)


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


def until_settled(client: TestClient, dataset: str) -> dict[str, Any]:
    ends = time.monotonic() + 120
    while (found := client.get(dataset).json())["status"] in ("processing", "uploading"):
        assert time.monotonic() < ends
        time.sleep(0.05)
    return dict(found)


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


def test_the_same_upload_sent_again_with_its_key_is_one_dataset(client: TestClient, workbench: Workbench) -> None:
    first = send(client, rows(10), headers={"Idempotency-Key": "a1"})
    again = send(client, rows(10), headers={"Idempotency-Key": "a1"})
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotency-replayed"] == "true"
    other = send(client, rows(11), headers={"Idempotency-Key": "a1"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert len(workbench.datasets.list()) == 1


def test_a_dataset_can_be_removed_as_soon_as_it_is_shown_as_ready(
    client: TestClient, workbench: Workbench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    removed: list[int] = []

    def remove_then_save(
        workbench: Workbench, upload: Upload, status: DatasetStatus, problem: str | None = None
    ) -> None:
        assert client.get(f"{V1}/datasets/{upload.id}").json()["status"] == "ready"
        removed.append(client.delete(f"{V1}/datasets/{upload.id}").status_code)
        save_outcome(workbench, upload, status, problem)

    monkeypatch.setattr(uploads, "save_outcome", remove_then_save)
    sent = client.post(f"{V1}/datasets", data={"name": "sums"}, files={"file": ("a.jsonl", rows(5))})
    ends = time.monotonic() + 30
    while not removed and time.monotonic() < ends:
        time.sleep(0.01)
    assert removed == [204]
    assert client.get(sent.headers["location"]).status_code == 404
    assert client.get(f"{V1}/datasets").json()["data"] == []
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
        assert client.delete(f"{V1}/datasets/{upload.id}").status_code == 409
    assert client.get(f"{V1}/datasets/{upload.id}").json()["file_name"] == "a.jsonl"
    assert client.delete(f"{V1}/datasets/{upload.id}").status_code == 204


def test_an_upload_that_was_removed_before_it_is_tried_again_stays_removed(workbench: Workbench) -> None:
    upload = waiting_upload(workbench)
    upload.problem = "it is tried again: the disk is full"
    uploads.save(workbench, upload)
    uploads.remove_upload(workbench, upload)
    assert import_upload(workbench, upload, lambda: False) is None
    assert list(workbench.path("uploads").iterdir()) == []


def test_an_upload_is_not_removed_while_bytes_are_added(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"name": "sums", "file_name": "a.jsonl", "size_bytes": 10}
    place = client.post(f"{V1}/uploads", json=asked).headers["location"]
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
