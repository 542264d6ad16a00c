"""The server's application: routes, problems, and the door before all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI

from lorasmith.api.credentials import Attempts, Credentials, Password
from lorasmith.api.openapi import OPENAPI_PATH, describe
from lorasmith.api.problems import show_problems
from lorasmith.api.routes import adapters, data, estimation, models, presets, system, uploads
from lorasmith.api.security import Door
from lorasmith.services.access import server_folder
from lorasmith.services.upload_imports import Importer
from lorasmith.services.workbench import Workbench
from lorasmith.settings import ServerSettings
from lorasmith.store.replies import Replies

ROUTERS = (
    system.router,
    uploads.router,
    uploads.parts_router,
    data.router,
    adapters.router,
    models.router,
    presets.router,
    estimation.router,
)


def create_app(workbench: Workbench, settings: ServerSettings) -> FastAPI:
    """The application of one home folder."""
    importer = Importer(workbench)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        importer.begin()
        yield
        importer.stop()

    app = FastAPI(
        title="lorasmith",
        version=version("lorasmith"),
        lifespan=lifespan,
        openapi_url=OPENAPI_PATH,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    credentials = Credentials(workbench.home)
    app.state.workbench = workbench
    app.state.settings = settings
    app.state.importer = importer
    app.state.replies = Replies(server_folder(workbench.home) / "replies.sqlite")
    app.state.credentials = credentials
    app.state.password = Password(settings.password)
    app.state.logins = Attempts(most=10, window_s=300)
    app.state.door_attempts = Attempts(most=20, window_s=60)
    for router in ROUTERS:
        app.include_router(router)
    show_problems(app, workbench.home)
    describe(app)
    app.add_middleware(
        Door,
        settings=settings,
        credentials=credentials,
        attempts=app.state.door_attempts,
        home=workbench.home,
    )
    return app
