"""Presets of training runs: the built-in ones and files `presets/NAME.yaml` of the home folder."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import yaml

from lorasmith.errors import Conflict, LorasmithError, NotFound, did_you_mean
from lorasmith.files import write_text
from lorasmith.schemas.training_presets import PRESETS
from lorasmith.services.training import USER_PRESETS, read_preset
from lorasmith.services.workbench import Workbench

ADDING = threading.Lock()  # two requests at once do not add one name


@dataclass(frozen=True)
class Preset:
    """`problem` says why a file cannot be used; it has no values then."""

    name: str
    built_in: bool
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str | None = None


def list_presets(workbench: Workbench) -> list[Preset]:
    """The built-in ones in their order, then the files by name."""
    built_in = [Preset(name, True, values) for name, values in PRESETS.items()]
    own = sorted(workbench.path(USER_PRESETS).glob("*.yaml"))
    return built_in + [read_own(workbench, path.stem) for path in own if path.stem not in PRESETS]


def read_own(workbench: Workbench, name: str) -> Preset:
    try:
        return Preset(name, False, read_preset(workbench.path(USER_PRESETS) / f"{name}.yaml"))
    except LorasmithError as error:
        return Preset(name, False, problem=error.message)


def show_preset(workbench: Workbench, name: str) -> Preset:
    presets = {preset.name: preset for preset in list_presets(workbench)}
    if name not in presets:
        raise NotFound(f"no preset {name!r}{did_you_mean(name, presets)}", hint=f"presets: {', '.join(presets)}")
    return presets[name]


def add_preset(workbench: Workbench, name: str, values: dict[str, dict[str, Any]]) -> Preset:
    """Write `presets/NAME.yaml`. Raises `Conflict` when there is one of that name, `InvalidSpec` for wrong values."""
    with ADDING:
        if any(preset.name == name for preset in list_presets(workbench)):
            raise Conflict(f"there is already a preset {name!r}", hint="choose another name")
        path = workbench.path(USER_PRESETS) / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        write_text(
            path, yaml.safe_dump({section: found for section, found in values.items() if found}, sort_keys=False)
        )
        try:
            read_preset(path)
        except LorasmithError:
            path.unlink()
            raise
        return show_preset(workbench, name)
