"""Freeze the starter datasets: held-out modules in the test part only, checked for leakage before they are written."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tools.starter.corpus import SourceFile
from tools.starter.leakage import ngram_set, normalised, shares_ngram
from tools.starter.tasks import SIGNATURE_INSTRUCTION, functions, interaction_row, signature_row

Row = dict[str, Any]

MAX_ROWS = {
    "signatures": {"train": 4000, "val": 200, "test": 450},
    "interactions": {"train": 1600, "val": 150, "test": 150},
}
VAL_ONE_IN = 12


def make_rows(files: Iterable[SourceFile]) -> dict[str, dict[str, list[Row]]]:
    """dataset → part → rows, each with its part in `split`; equal rows once, sampled with a fixed seed."""
    made: dict[str, dict[str, dict[str, Row]]] = {
        name: {"train": {}, "val": {}, "test": {}} for name in ("signatures", "interactions")
    }
    for file in files:
        part = "test" if file.held_out else "val" if in_validation(file.module) else "train"
        for function in functions(file):
            signature = signature_row(function)
            if signature is not None:
                made["signatures"][part].setdefault(normalised(function.header), {**signature, "split": part})
            interaction = interaction_row(function)
            if interaction is not None:
                key = normalised(interaction["execution"]["output"])
                made["interactions"][part].setdefault(key, {**interaction, "split": part})
    for parts in made.values():
        for part, others in (("val", ("train",)), ("test", ("train", "val"))):
            seen = {key for other in others for key in parts[other]}
            parts[part] = {key: row for key, row in parts[part].items() if key not in seen}
    return {
        name: {part: sample(rows, MAX_ROWS[name][part]) for part, rows in parts.items()} for name, parts in made.items()
    }


def in_validation(module: str) -> bool:
    return int.from_bytes(hashlib.sha256(f"validation:{module}".encode()).digest(), "big") % VAL_ONE_IN == 0


def sample(rows: dict[str, Row], size: int) -> list[Row]:
    keys = sorted(rows)
    chosen = random.Random(0).sample(keys, min(size, len(keys)))
    return [rows[key] for key in sorted(chosen, key=keys.index)]


def row_text(row: Row) -> str:
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    return f"{row['task']['description']}\n{row['execution']['output']}"


def essence(row: Row) -> str:
    """What must not have been read before: the header, or the code."""
    if "messages" in row:
        return normalised(row["messages"][0]["content"].removeprefix(SIGNATURE_INSTRUCTION))
    return normalised(row["execution"]["output"])


def drop_leaked(rows: dict[str, dict[str, list[Row]]], pretraining: list[str]) -> dict[str, int]:
    """Take out test rows that share a 13-gram with the pretraining text, or whose header or code it holds whole.

    Returns how many were taken out of each dataset.
    """
    grams = ngram_set(pretraining)
    whole_text = "\n".join(normalised(text) for text in pretraining)
    dropped: dict[str, int] = {}
    for name, parts in rows.items():
        clean = [
            row for row in parts["test"] if not shares_ngram(row_text(row), grams) and essence(row) not in whole_text
        ]
        dropped[name] = len(parts["test"]) - len(clean)
        parts["test"] = clean
    return dropped


def check(rows: dict[str, dict[str, list[Row]]], pretraining: list[str]) -> None:
    """The promises of the model card; raises AssertionError naming the row that breaks one."""
    grams = ngram_set(pretraining)
    for text in pretraining:
        assert SIGNATURE_INSTRUCTION not in text, "the pretraining text holds a chat turn of the demo's form"
    for name, parts in rows.items():
        train = {essence(row) for part in ("train", "val") for row in parts[part]}
        modules = {row["group"] for part in ("train", "val") for row in parts[part]}
        for row in parts["test"]:
            assert not shares_ngram(row_text(row), grams), f"{name}: a 13-gram of {row['source']} was pretrained on"
            assert essence(row) not in train, f"{name}: {row['source']} is in train too"
            assert row["group"] not in modules, f"{name}: module {row['group']} is in train too"
    assert sum(map(len, rows["signatures"].values())) >= 2000, "fewer than 2,000 signatures"
    assert sum(map(len, rows["interactions"].values())) >= 500, "fewer than 500 interactions"


def write(rows: dict[str, dict[str, list[Row]]], folder: Path) -> None:
    """`<dataset>.jsonl.gz`, byte for byte the same from one build to the next."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, parts in rows.items():
        lines = [json.dumps(row, ensure_ascii=False) for part in ("train", "val", "test") for row in parts[part]]
        data = ("\n".join(lines) + "\n").encode()
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(data, compresslevel=9, mtime=0))
