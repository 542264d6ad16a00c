"""Base models by name: the built-in one, registered folders and hub ids."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from lorasmith.errors import Conflict, NotFound, closest
from lorasmith.files import new_id
from lorasmith.model_files import check_model_folder, read_facts
from lorasmith.schemas.models import BaseModelEntry
from lorasmith.services.in_use import USES, refuse_while_used
from lorasmith.services.workbench import Workbench
from lorasmith.starter.location import STARTER, starter_model

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class ResolvedModel:
    """`location` is an absolute folder or a hub id; `name` is what reports and adapters call it."""

    name: str
    location: str


def starter_entry() -> BaseModelEntry:
    folder = starter_model()
    return BaseModelEntry(
        id=STARTER,
        name=STARTER,
        source="built-in",
        location=str(folder),
        facts=read_facts(folder),
        created_at=datetime.fromtimestamp((folder / "config.json").stat().st_mtime, UTC),
    )


def list_models(workbench: Workbench) -> list[BaseModelEntry]:
    """The built-in model, then the registered ones."""
    return [starter_entry(), *workbench.models.list()]


def show_model(workbench: Workbench, name: str) -> BaseModelEntry:
    if name == STARTER:
        return starter_entry()
    return workbench.models.require(name)


def add_model(workbench: Workbench, location: str, name: str | None) -> BaseModelEntry:
    """Register a folder, checked now, or a hub id, fetched when it is first used."""
    folder = Path(location).expanduser()
    if folder.is_dir():
        entry = BaseModelEntry(
            id=new_id("model"),
            name=name or folder.resolve().name,
            source="folder",
            location=str(folder.resolve()),
            facts=read_facts(folder),
        )
    elif HUB_ID.fullmatch(location):
        entry = BaseModelEntry(id=new_id("model"), name=name or location, source="hub", location=location)
    else:
        raise NotFound(f"{location} is neither a folder nor a hub id such as org/model")
    return workbench.models.add(entry)


def remove_model(workbench: Workbench, name: str) -> BaseModelEntry:
    """Forget a registered model; its files stay where they are. Raises `Conflict` while a job works with it."""
    if name == STARTER:
        raise Conflict(f"the model {STARTER!r} is built in", hint="only models that were added can be removed")
    with USES:
        entry = workbench.models.require(name)
        refuse_while_used(workbench, "model", entry.name, {"model": {entry.id, entry.name}})
        workbench.models.remove(entry.id)
    return entry


def model_below(roots: Iterable[Path], folder: str) -> Path:
    """The first folder of that name below one of the roots. Raises `NotFound` also for one that leads out of its root."""
    for root in roots:
        found = (root / folder).resolve()
        if found.is_relative_to(root.resolve()) and found.is_dir():
            return found
    raise NotFound(
        f"no folder {folder!r} below the server's import roots",
        hint="the server's LORASMITH_IMPORT_ROOTS names the folders that hold models",
    )


def resolve_model(workbench: Workbench, name: str, *, weights: bool = True) -> ResolvedModel:
    """`starter`, a registered name, a folder or a hub id; a folder is checked here, before anything is started.

    Without `weights` a folder may hold config and tokenizer alone.
    """
    if name == STARTER:
        return ResolvedModel(STARTER, str(starter_model()))
    entry = workbench.models.get(name)
    if entry is not None:
        if entry.source == "folder":
            check_model_folder(Path(entry.location), weights=weights)
        return ResolvedModel(entry.name, entry.location)
    folder = Path(name).expanduser()
    if folder.is_dir():
        check_model_folder(folder, weights=weights)
        return ResolvedModel(str(folder.resolve()), str(folder.resolve()))
    if HUB_ID.fullmatch(name) and not name.startswith("."):
        return ResolvedModel(name, name)
    near = closest(name, {STARTER, *workbench.models.names()})
    raise NotFound(
        f"no model {name!r}" + (f"; did you mean {near!r}?" if near else ""),
        hint="give `starter`, a folder, a hub id such as org/model, or a name from `lorasmith models list`",
    )
