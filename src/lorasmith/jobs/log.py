"""Lines of a job's log by where they end, so that a reader goes on where it stopped."""

from __future__ import annotations

from pathlib import Path

LINE_BYTES = 65_536  # a longer line is shown in pieces


def lines_after(path: Path, offset: int, limit: int) -> list[tuple[int, str]]:
    """At most `limit` whole lines that begin at `offset` or later, each with the offset at which it ends."""
    if not path.exists():
        return []
    found: list[tuple[int, str]] = []
    with path.open("rb") as handle:
        handle.seek(offset)
        while len(found) < limit:
            line = handle.readline(LINE_BYTES)
            if not line.endswith(b"\n") and len(line) < LINE_BYTES:
                break
            offset += len(line)
            found.append((offset, line.decode("utf-8", errors="replace").rstrip("\r\n")))
    return found
