"""Where the built-in model and datasets lie in the installed package."""

from __future__ import annotations

from pathlib import Path

STARTER = "starter"
DATASETS = ("signatures", "interactions")
FOLDER = Path(__file__).parent


def starter_model() -> Path:
    return FOLDER / "model"


def starter_dataset(name: str) -> Path:
    return FOLDER / "data" / f"{name}.jsonl.gz"
