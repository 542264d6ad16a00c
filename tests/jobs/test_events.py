"""Events and log lines from any place of their files, against reading them whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.engine.reporting import Reporter
from lorasmith.jobs.events import TAIL_BYTES, events_after, last_seq, newest
from lorasmith.jobs.folder import EventReader
from lorasmith.jobs.log import LINE_BYTES, lines_after


def write(path: Path, sizes: list[int], torn: str = "") -> None:
    """An event of each size in characters, with numbers from 1 on."""
    lines = (
        {"seq": seq, "time": "2026-01-01T00:00:00Z", "type": "step", "data": {"text": "x" * size}}
        for seq, size in enumerate(sizes, start=1)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + torn, encoding="utf-8")


@given(
    sizes=st.lists(st.sampled_from([0, 10, 900, 30_000, 100_000]), max_size=30),
    seq=st.integers(0, 35),
    limit=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
def test_events_after_a_number_are_those_of_the_whole_file(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seq: int, limit: int
) -> None:
    path = tmp_path_factory.mktemp("job") / "events.jsonl"
    write(path, sizes, torn='{"seq": 99')
    found = [event.seq for event in events_after(path, seq, limit)]
    assert found == list(range(seq + 1, len(sizes) + 1))[:limit]
    assert last_seq(path) == len(sizes)


def test_a_long_file_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    write(path, [100] * 20_000)
    parsed = []
    real = json.loads
    monkeypatch.setattr("lorasmith.schemas.jobs.json.loads", lambda line: parsed.append(1) or real(line))
    assert [event.seq for event in events_after(path, 15_000, 2)] == [15_001, 15_002]
    assert len(parsed) < 1_000, "a page and the way to it"


def test_the_newest_of_each_type(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert newest(path, "step") == {}
    write(path, [10] * 1_000)
    assert newest(path, "step", "evaluation")["step"].seq == 1_000
    assert path.stat().st_size > TAIL_BYTES


@pytest.mark.parametrize("broken", [b'{"seq": 3, "ti{"seq": 4}', b"5", b"\0" * 70_000], ids=["joined", "other", "long"])
def test_a_broken_line_takes_no_other_with_it(tmp_path: Path, broken: bytes) -> None:
    path = tmp_path / "events.jsonl"
    write(path, [30_000] * 8)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], broken, *lines[4:]]) + b"\n")
    whole = [1, 2, 5, 6, 7, 8]
    for seq in range(9):
        assert [event.seq for event in events_after(path, seq, 9)] == [one for one in whole if one > seq]
    assert last_seq(path) == Reporter(tmp_path).seq == 8
    read = list(EventReader(tmp_path).new_events())
    assert [event.seq for event in read] == [1, 2, 0, 5, 6, 7, 8]
    ends = len(lines[0]) + len(lines[1]) + len(broken) + 3
    assert read[2].data["text"] == f"the line of {path} that ends at byte {ends} is no event, and is passed over"
    path.write_bytes(b"\n".join([*lines[:2], broken]) + b"\n")
    assert last_seq(path) == Reporter(tmp_path).seq == 2


@pytest.mark.parametrize("torn", ['{"seq": 4, "ti', "x" * 200_000], ids=["short", "long"])
def test_reading_from_now_on_begins_after_whole_lines(tmp_path: Path, torn: str) -> None:
    """The next engine cuts off what was torn, and writes in its place."""
    write(tmp_path / "events.jsonl", [10] * 3, torn)
    reader = EventReader(tmp_path, from_now=True)
    report = Reporter(tmp_path)
    for text in ("one", "two"):
        report("note", text=text)
    assert [(event.seq, event.data["text"]) for event in reader.new_events()] == [(4, "one"), (5, "two")]


def test_log_lines_go_on_where_a_reader_stopped(tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    assert lines_after(path, 0, 5) == []
    path.write_bytes(b"one\r\ntwo \xff\nhalf")
    first = lines_after(path, 0, 1)
    assert first == [(5, "one")]
    assert lines_after(path, first[-1][0], 5) == [(11, "two \ufffd")]
    path.write_bytes(b"x" * (LINE_BYTES + 5) + b"\n")
    assert [len(text) for _, text in lines_after(path, 0, 5)] == [LINE_BYTES, 5]
