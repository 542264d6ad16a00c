"""`Prefer: wait=N` (RFC 7240): an answer that may take N seconds is waited for, and else comes as 202."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

import anyio
from fastapi import Header, Request, Response
from starlette.concurrency import run_in_threadpool

MOST_S = 60
LOOK_S = 0.2

Prefer = Annotated[
    str | None,
    Header(description=f"`wait=N` answers with the outcome if it is there within N seconds, at most {MOST_S}."),
]


def asked_wait_s(prefer: str | None) -> int:
    """Other preferences, and ones that are not understood, are passed over, as the RFC wants."""
    match = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,6})\b", prefer or "")
    return min(int(match[1]), MOST_S) if match else 0


async def wait_until(is_done: Callable[[], bool], prefer: str | None, request: Request, response: Response) -> bool:
    """Whether it is done within the time that the caller wants to wait. Ends early when the caller has gone."""
    seconds = asked_wait_s(prefer)
    if seconds:
        response.headers["Preference-Applied"] = f"wait={seconds}"
    ends = anyio.current_time() + seconds
    while not (done := await run_in_threadpool(is_done)):
        if anyio.current_time() >= ends or await request.is_disconnected():
            break
        await anyio.sleep(LOOK_S)
    return done
