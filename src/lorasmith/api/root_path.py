"""A server that a proxy shows below a path: what is asked there is found, and what it answers leads there again."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class RootPath:
    """Takes `root_path` off a request, if the proxy has not, and puts it before the path of a `Location`.

    All that is inside, the door too, sees paths without it.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["path"].startswith(f"{self.root_path}/"):
            scope = {**scope, "path": scope["path"][len(self.root_path) :]}
            scope.pop("raw_path", None)  # which is the path before it was decoded

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("location", "").startswith("/"):
                    headers["location"] = self.root_path + headers["location"]
            await send(message)

        await self.app(scope, receive, sending)
