"""ETag of what was read, and If-Match on what changes it: nobody overwrites what they have not seen."""

from __future__ import annotations

import threading
from typing import Annotated

from fastapi import Header, Response
from pydantic import BaseModel

from lorasmith.errors import Changed, PreconditionMissing
from lorasmith.files import sha256_bytes

IfMatch = Annotated[
    str | None, Header(description="ETag of the state that is changed, or `*`.", examples=['"5d41402a"'])
]
CHANGING = threading.Lock()  # between reading the state and changing it, no other request of this server does


def etag_of(resource: BaseModel) -> str:
    return f'"{sha256_bytes(resource.model_dump_json().encode())[:32]}"'


def tag(response: Response, resource: BaseModel) -> None:
    response.headers["ETag"] = etag_of(resource)


def check_match(resource: BaseModel, if_match: str | None, *, required: bool) -> None:
    """Raise `PreconditionMissing` or `Changed`; without `required` a change may come without a condition."""
    if if_match is None:
        if required:
            raise PreconditionMissing(
                "this change needs If-Match", hint="send the ETag of the last GET, or If-Match: *"
            )
        return
    wanted = {part.strip() for part in if_match.split(",")}
    if "*" not in wanted and etag_of(resource) not in wanted:
        raise Changed(
            f"it has changed since: its ETag is {etag_of(resource)}, not {if_match[:200]}", hint="read it again first"
        )
