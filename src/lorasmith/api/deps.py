"""What routes ask for: the workbench and the server's settings."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings


def current_workbench(request: Request) -> Workbench:
    workbench: Workbench = request.app.state.workbench
    return workbench


def current_settings(request: Request) -> ServerSettings:
    settings: ServerSettings = request.app.state.settings
    return settings


CurrentWorkbench = Annotated[Workbench, Depends(current_workbench)]
CurrentSettings = Annotated[ServerSettings, Depends(current_settings)]
