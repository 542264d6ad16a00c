"""Rows with planted near duplicates, made by recombining clauses of real text. Needs no library."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

STARTER = Path(__file__).parents[1] / "src" / "lorasmith" / "starter" / "data"
COPIES = 0.2  # share of the rows that are an edited copy of the row before
TOKEN = re.compile(r"[^\W_]+|[^\w\s]|_")


@dataclass(frozen=True)
class Planted:
    """Two rows by their line, and the Jaccard similarity of their sets of three-token shingles."""

    left: int
    right: int
    similarity: float


def shingle_set(text: str) -> set[tuple[str, ...]]:
    """Written apart from the program's own shingles, which hash: tokens as strings, padded with two marks a side."""
    tokens = ["", "", *TOKEN.findall(text.lower()), "", ""]
    return {tuple(tokens[place : place + 3]) for place in range(len(tokens) - 2)} if len(tokens) > 4 else set()


def jaccard(left: set[tuple[str, ...]], right: set[tuple[str, ...]]) -> float:
    return len(left & right) / len(left | right)


def clauses(folder: Path | None) -> list[list[str]]:
    """Runs of 3 to 9 words of the texts in a folder (*.jsonl, *.jsonl.gz, *.txt, *.md, *.py), or of the starter's data."""
    words: list[str] = []
    paths = sorted((folder or STARTER).iterdir())
    for path in paths:
        if path.suffix == ".gz":
            text = gzip.decompress(path.read_bytes()).decode()
        elif path.suffix in (".jsonl", ".txt", ".md", ".py"):
            text = path.read_text(encoding="utf-8")
        else:
            continue
        words += re.findall(r"[A-Za-z]+[,.;:]?", text.replace("\\n", " "))
    if len(words) < 1000:
        raise SystemExit(f"{folder} holds {len(words)} words; 1000 are needed to make rows")
    found, place, generator = [], 0, random.Random(0)
    while place < len(words):
        length = generator.randint(3, 9)
        found.append(words[place : place + length])
        place += length
    return found


def write_corpus(path: Path, num_rows: int, seed: int, folder: Path | None = None) -> list[Planted]:
    """JSONL rows with `instruction` and `output`; a planted copy follows its original at a distance of up to 50 rows."""
    generator = random.Random(seed)
    pieces = clauses(folder)
    vocabulary = [word for piece in pieces for word in piece]
    planted = []
    waiting: list[
        tuple[int, int, list[str], int]
    ] = []  # due line, line of the original, its words, where the answer starts
    with path.open("w", encoding="utf-8") as file:
        for line in range(num_rows):
            if waiting and waiting[0][0] <= line:
                _, original, words, answer_at = waiting.pop(0)
                copy = edited(words, generator, vocabulary)
                similarity = jaccard(shingle_set(" ".join(words)), shingle_set(" ".join(copy)))
                planted.append(Planted(original, line, similarity))
            else:
                copy = recombined(pieces, generator, generator.randint(10, 30))
                answer_at = len(copy)
                copy += recombined(pieces, generator, generator.randint(20, 60))
                if generator.random() < COPIES / (1 - COPIES):
                    due = line + generator.randint(1, 50)
                    waiting.append((max(due, waiting[-1][0] + 1) if waiting else due, line, copy, answer_at))
            row = {"instruction": " ".join(copy[:answer_at]), "output": " ".join(copy[answer_at:])}
            file.write(json.dumps(row) + "\n")
    return planted


def recombined(pieces: list[list[str]], generator: random.Random, at_least: int) -> list[str]:
    words: list[str] = []
    while len(words) < at_least:
        words += generator.choice(pieces)
    return words


def edited(words: list[str], generator: random.Random, vocabulary: list[str]) -> list[str]:
    """Words replaced until about the wanted share of shingles is left: uniform between 0.5 and 1."""
    wanted = generator.uniform(0.5, 1)
    changed_share = (1 - wanted) / (1 + wanted)  # of n shingles d are new: J = (n - d) / (n + d)
    budget = changed_share * (len(words) + 2)
    copy = list(words)
    while budget >= 1:
        first = generator.randrange(len(copy))
        length = min(max(1, int(budget) - 2), 6, len(copy) - first)
        copy[first : first + length] = [generator.choice(vocabulary) for _ in range(length)]
        budget -= length + 2
    return copy


def read_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    with path.open(encoding="utf-8") as file:
        for line, text in enumerate(file):
            row = json.loads(text)
            yield line, row["instruction"], row["output"]
