"""Events of a job by number: `events.jsonl` is the only copy, searched where it lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from lorasmith.schemas.jobs import Event, read_event

TAIL_BYTES = 65_536  # holds the newest step and evaluation of any run


def events_after(path: Path, seq: int, limit: int) -> list[Event]:
    """At most `limit` events that follow number `seq`, oldest first; the cost does not grow with those before."""
    if not path.exists():
        return []
    found: list[Event] = []
    with path.open("rb") as handle:
        handle.seek(offset_after(handle, seq))
        for event in whole_lines(handle):
            if event.seq > seq:
                found.append(event)
                if len(found) == limit:
                    break
    return found


def offset_after(handle: IO[bytes], seq: int) -> int:
    """Where the first line with a higher number begins, or a line before it: the numbers grow along the file."""
    low, high = 0, os.fstat(handle.fileno()).st_size
    while high - low > TAIL_BYTES:
        middle = (low + high) // 2
        handle.seek(middle)
        handle.readline()  # the rest of a line that began earlier
        begin = handle.tell()
        event = next(whole_lines(handle), None) if begin < high else None
        if event is None or event.seq > seq:
            high = middle
        else:
            low = begin
    return low


def whole_lines(handle: IO[bytes]) -> Iterator[Event]:
    """Events from here on; a line that is still being written ends them, and one that cannot be read is passed over."""
    for line in handle:
        if not line.endswith(b"\n"):
            return
        event = read_event(line)
        if event is not None:
            yield event


def newest(path: Path, *types: str) -> dict[str, Event]:
    """The last event of each type within the file's tail."""
    if not path.exists():
        return {}
    with path.open("rb") as handle:
        begin = max(0, os.fstat(handle.fileno()).st_size - TAIL_BYTES)
        handle.seek(begin)
        if begin:
            handle.readline()
        return {event.type: event for event in whole_lines(handle) if event.type in types}


def last_seq(path: Path) -> int:
    """Number of the newest event; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        window = TAIL_BYTES
        while True:
            handle.seek(max(0, size - window))
            if window < size:
                handle.readline()
            seqs = [event.seq for event in whole_lines(handle)]
            if seqs or window >= size:
                return seqs[-1] if seqs else 0
            window *= 4  # a line longer than the window
