"""Responses of server-sent events that hundreds of readers hold open beside a training run.

Per event and reader there is one write, and no timer or task. Format: WHATWG HTML, section 9.2.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lorasmith.api.contents import EVENT_STREAM

HEARTBEAT_S = 15.0  # after so much silence a proxy closes a connection
SEND_TIMEOUT_S = 10.0  # a reader that takes nothing for so long is gone
RECHECK_S = 30.0  # between two looks at a reader's credentials
HEARTBEAT = b": nothing new\n\n"

Chunks = AsyncGenerator[bytes]


def frame(event: str, data: str, last_id: str | None = None) -> bytes:
    """One event; `data` is one line."""
    named = f"event: {event}\ndata: {data}\n\n".encode()
    return named if last_id is None else b"id: %s\n%s" % (last_id.encode(), named)


class EventStream(Response):
    """Sends chunks of frames as they come. An empty chunk says that there is nothing new: the moment for a heartbeat."""

    media_type = EVENT_STREAM
    writing: asyncio.Task[None]  # while it is open

    # FastAPI documents the status that stands here as the default.
    def __init__(
        self, chunks: Chunks, streams: OpenStreams, still_allowed: Callable[[], bool], status_code: int = 200
    ) -> None:
        super().__init__(status_code=status_code, headers={"X-Accel-Buffering": "no", "Cache-Control": "no-store"})
        del self.headers["content-length"]
        self.chunks, self.streams, self.still_allowed = chunks, streams, still_allowed
        self.sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        self.writing = asyncio.create_task(self.write(send))
        leaving = asyncio.create_task(left(receive))
        self.streams.open.add(self)
        try:
            await asyncio.wait((self.writing, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.streams.open.discard(self)
            gone = leaving.done() or self.sending_since is not None
            leaving.cancel()
            self.writing.cancel()
            await asyncio.gather(self.writing, leaving, return_exceptions=True)
        if not self.writing.cancelled():
            self.writing.result()  # raises what went wrong
        if not gone:
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def write(self, send: Send) -> None:
        now = asyncio.get_running_loop().time
        spoke = checked = now()
        async with aclosing(self.chunks):
            async for chunk in self.chunks:
                at = now()
                if at - checked >= RECHECK_S:
                    checked = at
                    if not self.still_allowed():
                        return
                if not chunk and at - spoke < HEARTBEAT_S:
                    continue
                spoke = self.sending_since = at
                await send({"type": "http.response.body", "body": chunk or HEARTBEAT, "more_body": True})
                self.sending_since = None


async def left(receive: Receive) -> None:
    """Until the reader has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


class OpenStreams:
    """The streams of a server."""

    def __init__(self) -> None:
        self.open: set[EventStream] = set()

    async def run(self) -> None:
        """Leave those who take nothing, for as long as the server lives."""
        while True:
            await asyncio.sleep(SEND_TIMEOUT_S / 10)
            overdue = asyncio.get_running_loop().time() - SEND_TIMEOUT_S
            for stream in self.open:
                if stream.sending_since is not None and stream.sending_since < overdue:
                    stream.writing.cancel()

    def end(self) -> None:
        for stream in self.open:
            stream.writing.cancel()
