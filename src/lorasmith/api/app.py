"""The server's application: routes, problems, and the door before all of them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from starlette.routing import BaseRoute

from lorasmith.api.credentials import Attempts, Credentials, Password
from lorasmith.api.event_streams import OpenStreams
from lorasmith.api.feeds import Feeds
from lorasmith.api.metrics import Measured, Metrics
from lorasmith.api.openapi import OPENAPI_PATH, describe
from lorasmith.api.problems import show_problems
from lorasmith.api.retries import Retries
from lorasmith.api.root_path import RootPath
from lorasmith.api.routes import (
    adapters,
    data,
    data_steps,
    data_versions,
    estimation,
    models,
    openai,
    presets,
    secrets,
    system,
    training,
    uploads,
)
from lorasmith.api.security import Door
from lorasmith.services.access import server_folder
from lorasmith.services.upload_imports import Importer
from lorasmith.services.workbench import Workbench
from lorasmith.services.worker import Worker
from lorasmith.settings import ServerSettings
from lorasmith.store.replies import Replies

log = logging.getLogger(__name__)

ROUTERS = (
    system.router,
    uploads.router,
    uploads.parts_router,
    data.router,
    data_steps.router,
    data_versions.router,
    training.router,
    adapters.router,
    models.router,
    presets.router,
    estimation.router,
    secrets.router,
    openai.router,
)


@cache
def all_routes() -> list[BaseRoute]:
    """Reading their signatures takes a third of a second, once a process."""
    routes = APIRouter(generate_unique_id_function=lambda route: route.name)
    for router in ROUTERS:
        routes.include_router(router)
    return routes.routes


def create_app(workbench: Workbench, settings: ServerSettings) -> FastAPI:
    """The application of one home folder."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.importer = importer = Importer(workbench)
        app.state.feeds = Feeds(workbench)
        background = [asyncio.create_task(one) for one in (app.state.feeds.run(), app.state.streams.run())]
        importer.begin()
        with own_worker(workbench, settings):
            yield
        importer.stop()
        for task in background:
            task.cancel()

    app = FastAPI(
        title="lorasmith",
        version=version("lorasmith"),
        lifespan=lifespan,
        openapi_url=OPENAPI_PATH,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    credentials = Credentials(workbench.home)
    app.state.workbench = workbench
    app.state.settings = settings
    app.state.retries = Retries()
    app.state.replies = Replies(server_folder(workbench.home) / "replies.sqlite")
    app.state.credentials = credentials
    app.state.streams = OpenStreams()
    app.state.password = Password(settings.password)
    app.state.logins = Attempts(most=10, window_s=300)
    app.state.door_attempts = Attempts(most=20, window_s=60)
    app.router.routes.extend(all_routes())
    show_problems(app, workbench.home)
    describe(app, settings.root_path)
    app.state.metrics = Metrics(workbench)
    app.add_middleware(
        Door,
        settings=settings,
        credentials=credentials,
        attempts=app.state.door_attempts,
        home=workbench.home,
    )
    app.add_middleware(Measured, metrics=app.state.metrics)  # around the door, so that it counts refusals too
    if settings.root_path:
        app.add_middleware(RootPath, root_path=settings.root_path)
    return app


@contextmanager
def own_worker(workbench: Workbench, settings: ServerSettings) -> Iterator[None]:
    """A worker in a thread of the server; what it has started goes on when the server ends."""
    if settings.worker_cores is None:
        yield
        return
    stop = threading.Event()
    worker = Worker(workbench, settings.worker_cores, lambda job, text: log.info("%s %s: %s", job.id, job.name, text))
    thread = threading.Thread(target=worker.run, args=(stop.wait,), name="worker", daemon=True)
    thread.start()
    yield
    stop.set()
    thread.join()
