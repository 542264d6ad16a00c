"""What a request may name: rows and hub ids, never a path of the server."""

from __future__ import annotations

from pathlib import Path

from lorasmith.errors import NotFound, did_you_mean
from lorasmith.services.models import HUB_ID
from lorasmith.services.workbench import Workbench
from lorasmith.starter.location import DATASETS, STARTER


def check_model(workbench: Workbench, name: str) -> None:
    """Raise `NotFound` unless it is the built-in model, a registered one, or a hub id that is no folder here."""
    known = {STARTER, *workbench.models.names()}
    is_hub_id = HUB_ID.fullmatch(name) is not None and not Path(name).exists()
    if name not in known and workbench.models.get(name) is None and not is_hub_id:
        hint = "GET /api/v1/finetune/models lists those that are registered; or a hub id such as org/model"
        raise NotFound(f"no model {name!r}{did_you_mean(name, known)}", hint=hint)


def check_dataset(workbench: Workbench, name: str) -> None:
    """Raise `NotFound` unless it is a stored or a built-in dataset."""
    if name not in DATASETS:
        workbench.datasets.require(name)
