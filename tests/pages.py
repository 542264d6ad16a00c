"""The blocks of code in a page, with what their marks say; `test_docs.py` has the marks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"<!-- (?P<key>not run|exits with|home):? (?P<value>[^>]+?) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    language: str
    code: str
    not_run: str | None
    exits_with: int
    output: str | None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    for index, fence in enumerate(fences):
        comment = COMMENT.search(text[: fence.start()])
        marks = {comment["key"]: comment["value"]} if comment else {}
        following = fences[index + 1] if index + 1 < len(fences) else None
        output = None
        if following and following["language"] == "text" and not text[fence.end() : following.start()].strip():
            output = following["code"]
        line = text.count("\n", 0, fence.start()) + 1
        yield Block(
            page,
            line,
            fence["language"],
            fence["code"],
            marks.get("not run"),
            int(marks.get("exits with", 0)),
            output,
        )
