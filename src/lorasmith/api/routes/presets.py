"""Presets of training runs: list, read, add."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Response

from lorasmith.api.deps import CurrentWorkbench
from lorasmith.api.idempotency import IdempotentRoute
from lorasmith.api.paging import Cursor, Limit, page_of
from lorasmith.api.problems import without_paths
from lorasmith.schemas.api import Page
from lorasmith.schemas.api_training import PRESET_NAME, PresetRequest, PresetResource
from lorasmith.services.presets import Preset, add_preset, list_presets, show_preset
from lorasmith.services.workbench import Workbench

router = APIRouter(prefix="/api/v1/finetune/presets", tags=["presets"], route_class=IdempotentRoute)


def preset_resource(workbench: Workbench, preset: Preset) -> PresetResource:
    return PresetResource(
        id=preset.name,
        name=preset.name,
        built_in=preset.built_in,
        lora_config=preset.values.get("lora", {}),
        training_config=preset.values.get("training", {}),
        problem=None if preset.problem is None else without_paths(preset.problem, workbench.home),
    )


@router.get("")
def list_all_presets(workbench: CurrentWorkbench, limit: Limit = 50, cursor: Cursor = None) -> Page[PresetResource]:
    """List the built-in presets, then those of your own by name"""
    presets = list_presets(workbench)
    names = [preset.name for preset in presets]
    start = names.index(cursor) + 1 if cursor in names else 0 if cursor is None else len(names)
    found = [preset_resource(workbench, preset) for preset in presets[start : start + limit + 1]]
    return page_of(found, limit, lambda one: one.id)


@router.post("", status_code=201)
def create_preset(workbench: CurrentWorkbench, asked: PresetRequest, response: Response) -> PresetResource:
    """Add a preset of your own, which the command line knows too"""
    lora = asked.lora_config.model_dump(exclude_unset=True, exclude={"bias"}) if asked.lora_config else {}
    training = asked.training_config.settings() if asked.training_config else {}
    added = add_preset(workbench, asked.name, {"lora": lora, "training": training})
    response.headers["Location"] = f"/api/v1/finetune/presets/{added.name}"
    return preset_resource(workbench, added)


@router.get("/{preset_id}")
def get_preset(workbench: CurrentWorkbench, preset_id: Annotated[str, Path(pattern=PRESET_NAME)]) -> PresetResource:
    """Show a preset"""
    return preset_resource(workbench, show_preset(workbench, preset_id))
