"""Files that come over the network, as they come: cut off, too long, of the wrong kind, with names that mean harm."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lorasmith.services.workbench import Workbench
from tests.api.conftest import rows
from tests.api.upload_cases import DATASETS, nothing_is_left, send


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


def test_the_same_upload_sent_again_with_its_key_is_one_dataset(client: TestClient, workbench: Workbench) -> None:
    first = send(client, rows(10), headers={"Idempotency-Key": "a1"})
    again = send(client, rows(10), headers={"Idempotency-Key": "a1"})
    assert (again.status_code, again.json()["id"]) == (202, first.json()["id"])
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["idempotency-replayed"] == "true"
    other = send(client, rows(11), headers={"Idempotency-Key": "a1"})
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")
    assert len(workbench.datasets.list()) == 1
