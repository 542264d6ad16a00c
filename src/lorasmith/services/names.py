"""What callers from the network may name: stored things by name or id, hub ids; never a path of this machine."""

from __future__ import annotations

from pathlib import Path

from lorasmith.errors import InvalidSpec, NotFound, did_you_mean
from lorasmith.services.data_versions import find_version
from lorasmith.services.models import HUB_ID
from lorasmith.services.workbench import Workbench
from lorasmith.starter.location import DATASETS, STARTER


def check_model_name(workbench: Workbench, name: str) -> None:
    """Raise unless it is `starter`, a registered model, or a hub id that no folder of this machine hides behind."""
    if name == STARTER or workbench.models.get(name) is not None:
        return
    if HUB_ID.fullmatch(name) and ".." not in name:
        if Path(name).exists():
            raise InvalidSpec(f"{name!r} is also a folder beside the server", hint="start the server somewhere else")
        return
    names = {STARTER, *workbench.models.names()}
    raise NotFound(
        f"no model {name!r}{did_you_mean(name, names)}",
        hint="`starter`, a hub id such as org/model, or one that POST /api/v1/finetune/models has added",
    )


def check_dataset_name(workbench: Workbench, name: str) -> None:
    """Raise unless it is a stored or a built-in dataset."""
    if name in DATASETS or find_version(workbench, name) is not None:
        return
    names = {*DATASETS, *workbench.datasets.names()}
    raise NotFound(
        f"no dataset {name!r}{did_you_mean(name, names)}",
        hint="GET /api/v1/finetune/datasets lists them; POST there uploads one",
    )
