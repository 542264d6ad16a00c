"""Rows to import, and the folders that imports leave in a workbench."""

from __future__ import annotations

from pathlib import Path

from lorasmith.services.workbench import Workbench

SUPPORT = Path(__file__).parents[2] / "examples" / "support.jsonl"


def dataset_folders(workbench: Workbench) -> list[str]:
    folder = workbench.home / "datasets"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
