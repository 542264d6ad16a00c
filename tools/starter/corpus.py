"""The standard library of the running Python as clean text, with whole modules held out.

A module is the first part of a file's path below the library folder (`csv`, `importlib`); it is held out
as a whole, so nothing of a test row's package is ever seen in training.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SALT = "lorasmith-starter"
HELD_OUT_ONE_IN = 8

# Not prose or program: generated tables, tests, vendored wheels. `encodings` alone is 1.4 MB of codec tables.
EXCLUDED_FOLDERS = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",
    "pydoc_data",
    "lib-dynload",
    "__pycache__",
    "_bundled",
    "ensurepip",
}
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "__phello__")
EXCLUDED_FILES = {"html/entities.py", "_osx_support.py", "this.py", "pip/__pip-runner__.py"}

# A line that is mostly digits, quotes and punctuation is a table row (unicode ranges, opcode lists, keysyms).
TABLE_LINE_LETTER_SHARE = 0.25
TABLE_RUN_LINES = 8


@dataclass(frozen=True)
class SourceFile:
    """One library file: `path` relative to the library, `module` its top-level name, `text` cleaned."""

    path: str
    module: str
    text: str
    held_out: bool


def library_folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(module: str) -> bool:
    digest = hashlib.sha256(f"{HELD_OUT_SALT}:{module}".encode()).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def is_wanted(relative: Path) -> bool:
    if any(part in EXCLUDED_FOLDERS for part in relative.parts[:-1]):
        return False
    return relative.as_posix() not in EXCLUDED_FILES and not relative.parts[0].startswith(EXCLUDED_PREFIXES)


def looks_like_table(line: str) -> bool:
    stripped = line.strip()
    if len(stripped) < 12:
        return False
    letters = sum(character.isalpha() for character in stripped)
    return letters / len(stripped) < TABLE_LINE_LETTER_SHARE


def clean(text: str) -> str:
    """The text without licence banners, ruler comments, long literal tables and trailing space."""
    lines = [line.expandtabs(8).rstrip() for line in text.replace("\f", "").splitlines()]
    if lines and lines[0].startswith("#!"):
        lines = lines[1:]
    lines = [line for line in lines if not re.fullmatch(r"\s*#[\s#*=~_-]*", line)]
    lines = [line for line in lines if not re.search(r"coding[:=]\s*[-\w.]+|\$Id:", line)]
    lines = drop_leading_licence(lines)
    lines = drop_tables(lines)
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip() + "\n"


def drop_leading_licence(lines: list[str]) -> list[str]:
    end = 0
    while end < len(lines) and (not lines[end] or lines[end].startswith("#")):
        end += 1
    head = "\n".join(lines[:end]).lower()
    return lines[end:] if "copyright" in head or "licen" in head else lines


def drop_tables(lines: list[str]) -> list[str]:
    kept: list[str] = []
    run: list[str] = []
    for line in [*lines, ""]:
        if looks_like_table(line):
            run.append(line)
            continue
        if len(run) < TABLE_RUN_LINES:
            kept.extend(run)
        run = []
        kept.append(line)
    return kept[:-1]


def read_library(folder: Path | None = None) -> Iterator[SourceFile]:
    """Every wanted file that parses, in path order, so that two runs give the same text."""
    folder = folder or library_folder()
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if not is_wanted(relative):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # lib2to3 and tests keep files that are broken on purpose
        module = relative.parts[0].removesuffix(".py")
        cleaned = clean(text)
        if len(cleaned) > 200:
            yield SourceFile(relative.as_posix(), module, cleaned, is_held_out(module))
