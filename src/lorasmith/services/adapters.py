"""The adapter store: list, show, remove, and check that files are what they were."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorasmith.errors import InvalidData
from lorasmith.files import verify_manifest
from lorasmith.schemas.adapters import Adapter
from lorasmith.services.in_use import USES, refuse_while_used
from lorasmith.services.job_outcomes import adapter_digest
from lorasmith.services.workbench import Workbench


def list_adapters(workbench: Workbench) -> list[Adapter]:
    return workbench.adapters.list()


def show_adapter(workbench: Workbench, name_or_id: str) -> Adapter:
    return workbench.adapters.require(name_or_id)


def remove_adapter(workbench: Workbench, name_or_id: str) -> Adapter:
    """Row first, files second: a crash between them leaves files that nothing points at, never a row without files.

    Raises `Conflict` while a job works with it.
    """
    with USES:
        adapter = workbench.adapters.require(name_or_id)
        refuse_while_used(workbench, "adapter", adapter.name, {"adapter": {adapter.id, adapter.name}})
        workbench.adapters.remove(adapter.id)
    shutil.rmtree(workbench.path(adapter.folder), ignore_errors=True)
    return adapter


def verify_adapter(workbench: Workbench, name_or_id: str) -> Adapter:
    """Raise `InvalidData` unless every file matches its checksum and the content its digest."""
    adapter = workbench.adapters.require(name_or_id)
    folder = workbench.path(adapter.folder)
    verify_manifest(folder)
    if adapter_digest(folder) != adapter.digest:
        raise InvalidData(f"adapter {adapter.name!r} is not the content that was stored under it")
    return adapter


def adapter_folder(workbench: Workbench, adapter: Adapter) -> Path:
    return workbench.path(adapter.folder)
