"""`Idempotency-Key` on POST: the same request sent again gets the first one's answer and does nothing.

https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header: another request with the key is 422, one
whose first is still being answered 409. Only answers of success are kept: after an error the key is free again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool

from lorasmith.errors import Conflict, InvalidSpec
from lorasmith.files import sha256_bytes
from lorasmith.store.replies import Replies, Reply

KEY = re.compile(r"[\x21-\x7e]{1,255}")
KEPT_HEADERS = ("content-type", "location", "etag", "preference-applied")

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class KeyReused(InvalidSpec):
    """The key belongs to another request."""

    code = "idempotency_key_reused"


def key_of(request: Request) -> str | None:
    """The key with the address that it was sent to; None without one. Raises `InvalidSpec` for one that is no key."""
    key = request.headers.get("idempotency-key")
    if key is None or request.method != "POST":
        return None
    if not KEY.fullmatch(key):
        raise InvalidSpec("an Idempotency-Key has 1 to 255 printable ASCII characters", hint="take a UUID")
    return f"{request.url.path} {key}"


async def answer_once(
    request: Request, key: str, digest: str, answer: Callable[[], Coroutine[Any, Any, Response]]
) -> Response:
    """`answer()`, or what it was the first time. `digest` is that of what the request says."""
    replies: Replies = request.app.state.replies
    known = await run_in_threadpool(replies.take, key, digest)
    if known is not None:
        return replayed(known, digest)
    try:
        response = await answer()
    except BaseException:
        await run_in_threadpool(replies.free, key)
        raise
    if response.status_code >= 300:
        await run_in_threadpool(replies.free, key)
        return response
    headers = {name: response.headers[name] for name in KEPT_HEADERS if name in response.headers}
    await run_in_threadpool(replies.keep, key, response.status_code, headers, bytes(response.body))
    return response


def replayed(known: Reply, digest: str) -> Response:
    if known.digest != digest:
        raise KeyReused("this Idempotency-Key was sent with another request", hint="take a new key for a new request")
    if known.status is None:
        raise Conflict(
            "the first request with this Idempotency-Key is still being answered", hint="send it again later"
        )
    return Response(known.body, known.status, {**known.headers, "Idempotency-Replayed": "true"})


class IdempotentRoute(APIRoute):
    """A route whose POST obeys the key; the request's digest is that of its body."""

    def get_route_handler(self) -> Handler:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            key = key_of(request)
            if key is None:
                return await handler(request)
            digest = sha256_bytes(await request.body() + b"\0" + request.url.query.encode())
            return await answer_once(request, key, digest, lambda: handler(request))

        return handle
