"""What a job says and is asked while it runs."""

from __future__ import annotations

import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine import reporting
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import DiskFull, LorasmithError
from lorasmith.files import read_json
from lorasmith.jobs.folder import EventReader, write_request
from lorasmith.schemas.jobs import JobRequest


def test_a_request_that_comes_while_another_is_read_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = Reporter(tmp_path)
    write_request(tmp_path, JobRequest.CHECKPOINT)

    def ask_for_a_pause(path: Path) -> Any:
        found = read_json(path)
        write_request(tmp_path, JobRequest.PAUSE)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(reporting, "read_json", ask_for_a_pause)
        assert report.poll()
    assert not report.stop_requested
    assert not report.poll()
    assert report.stop_requested
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"request": "stop"}', '{"requests": "pause"}', "[" * 100_000])
def test_what_is_no_request_is_passed_over_with_a_word(tmp_path: Path, text: str) -> None:
    report = Reporter(tmp_path)
    (tmp_path / "control.json").write_text(text, encoding="utf-8")
    assert not report.poll()
    assert not report.stop_requested
    assert texts(tmp_path) == [
        (1, 'control.json is passed over: it is not {"request": "checkpoint" or "pause" or "cancel"}')
    ]
    write_request(tmp_path, JobRequest.CANCEL)
    report.poll()
    assert report.stop_requested


def test_an_event_that_does_not_fit_on_the_disk_leaves_whole_lines(small_disk: Path) -> None:
    report = Reporter(small_disk)
    report("note", text="one")
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 8192))
    with pytest.raises(DiskFull):
        report("note", text="x" * 20_000)  # two pages of it fit
    assert (small_disk / "events.jsonl").read_bytes().count(b"\n") == 1
    report("note", text="two")
    assert texts(small_disk) == [(1, "one"), (2, "two")]
    assert Reporter(small_disk).seq == 2


def test_half_an_event_is_taken_back(tmp_path: Path) -> None:
    report = Reporter(tmp_path)
    report("note", text="one")
    with no_file_above(200), pytest.raises(LorasmithError, match="a file would be larger than this process may write"):
        report("note", text="x" * 300)
    report("note", text="two")
    assert texts(tmp_path) == [(1, "one"), (2, "two")]


@contextmanager
def no_file_above(size_bytes: int) -> Iterator[None]:
    """What is written beyond it fails, after the part that still fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def texts(folder: Path) -> list[tuple[int, str]]:
    return [(event.seq, event.data["text"]) for event in EventReader(folder).new_events()]
