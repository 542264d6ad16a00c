"""The rows and the first adapter in the forms that libraries take. Needs no library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import protocol

IGNORED = -100  # the label of a token without a loss, in every library


def labelled_rows(settings: protocol.Settings) -> list[dict[str, list[int]]]:
    """The rows of the wanted steps, one after the other, with labels in place of completion masks."""
    rows, size = protocol.read_rows(settings), settings["rows_per_step"]
    wanted = [row for step in settings["steps"] for row in rows[step * size : (step + 1) * size]]
    return [
        {
            "input_ids": row["input_ids"],
            "attention_mask": [1] * len(row["input_ids"]),
            "labels": [
                token if mask else IGNORED for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True)
            ],
        }
        for row in wanted
    ]


def adapter_with_dropout(settings: protocol.Settings, folder: Path) -> str:
    """A copy of the first adapter whose own file says the dropout, for libraries that ignore theirs for a loaded adapter."""
    copied = folder / "adapter"
    shutil.copytree(settings["adapter"], copied)
    path = copied / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "lora_dropout": settings["dropout"]}), encoding="utf-8")
    return str(copied)
