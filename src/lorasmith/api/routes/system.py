"""Whether the server lives and works, who is logged in, and what it counts."""

from __future__ import annotations

import logging
import os
import shutil
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from starlette.concurrency import run_in_threadpool

from lorasmith.api.credentials import SESSION_COOKIE, SESSION_S, Attempts
from lorasmith.api.deps import CurrentWorkbench
from lorasmith.api.security import LOGIN_PATH
from lorasmith.errors import Unauthorized
from lorasmith.settings import ServerSettings

log = logging.getLogger(__name__)
router = APIRouter(tags=["system"])
NEEDED_FREE_BYTES = 50 * 1024**2


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """`checks` are `ok`, or what is wrong in one word."""

    status: Literal["ready", "not_ready"]
    checks: dict[str, str] = Field(examples=[{"database": "ok", "disk": "ok"}])


class Login(BaseModel):
    """The password that the server was started with, or the API's token."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"password": "correct horse battery"}]})

    password: Annotated[SecretStr, Field(min_length=1, max_length=1024)]


class Session(BaseModel):
    authenticated_by: Literal["token", "session"]


@router.get("/healthz")
def health() -> Health:
    """Answer as long as the process lives"""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness, "description": "Not ready"}})
def readiness(workbench: CurrentWorkbench, response: Response) -> Readiness:
    """Say whether rows can be read and files written"""
    checks = {"database": database_state(workbench), "disk": disk_state(workbench)}
    ready = set(checks.values()) == {"ok"}
    response.status_code = 200 if ready else 503
    return Readiness(status="ready" if ready else "not_ready", checks=checks)


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(request: Request) -> PlainTextResponse:
    """Counters for Prometheus: requests, jobs, datasets, adapters, uploads, free disk"""
    return PlainTextResponse(request.app.state.metrics.text(), media_type="text/plain; version=0.0.4")


def database_state(workbench: CurrentWorkbench) -> str:
    try:
        workbench.datasets.page(1)
    except Exception:  # whatever it is, the caller may not know more
        log.exception("the database cannot be read")
        return "unreadable"
    return "ok"


def disk_state(workbench: CurrentWorkbench) -> str:
    if not os.access(workbench.home, os.W_OK):
        return "read_only"
    return "ok" if shutil.disk_usage(workbench.home).free >= NEEDED_FREE_BYTES else "full"


@router.post(LOGIN_PATH)
async def login(request: Request, response: Response, given: Login) -> Session:
    """Begin a session, which a cookie keeps; its changes also need the header `X-Lorasmith-Request`"""
    attempts: Attempts = request.app.state.logins
    address = request.client.host if request.client else "unknown"
    attempts.check(address)
    word = given.password.get_secret_value()
    credentials = request.app.state.credentials
    known = credentials.token.matches(word) or await run_in_threadpool(request.app.state.password.matches, word)
    if not known:
        attempts.note_failure(address)
        raise Unauthorized("this is neither the password nor the token of this server")
    response.set_cookie(
        SESSION_COOKIE,
        credentials.sessions.begin(),
        max_age=int(SESSION_S),
        httponly=True,
        samesite="strict",
        secure=is_encrypted(request),
        path=cookie_path(request),
    )
    return Session(authenticated_by="session")


def is_encrypted(request: Request) -> bool:
    """Between the browser and us, or the proxy before us: the door has checked the Origin, which says how its page was reached."""
    return request.url.scheme == "https" or request.headers.get("origin", "").startswith("https://")


def cookie_path(request: Request) -> str:
    settings: ServerSettings = request.app.state.settings
    return settings.root_path or "/"


@router.post("/api/v1/logout", status_code=204)
def logout(request: Request, response: Response) -> None:
    """End the session of this cookie"""
    session = request.cookies.get(SESSION_COOKIE)
    if session is not None:
        request.app.state.credentials.sessions.end(session)
    response.delete_cookie(
        SESSION_COOKIE, httponly=True, samesite="strict", secure=is_encrypted(request), path=cookie_path(request)
    )


@router.get("/api/v1/session")
def session(request: Request) -> Session:
    """Say how this request proved itself"""
    return Session(authenticated_by=request.state.caller)
