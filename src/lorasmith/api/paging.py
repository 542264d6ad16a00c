"""Pages of a list by cursor: the id of the last item that was seen. New rows do not shift a page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Query

from lorasmith.schemas.api import Page

Item = TypeVar("Item")

Limit = Annotated[int, Query(ge=1, le=200, description="Most items of a page.")]
Cursor = Annotated[
    str | None,
    Query(pattern=r"^[A-Za-z0-9._/-]{1,200}$", description="`next_cursor` of the page before; absent: the first page."),
]


def page_of(found: Sequence[Item], limit: int, id_of: Callable[[Item], str]) -> Page[Item]:
    """From one item more than the limit, if there is one."""
    shown = list(found[:limit])
    return Page(data=shown, next_cursor=id_of(shown[-1]) if len(found) > limit else None)
