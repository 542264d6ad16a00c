"""Answers that are no JSON, as the OpenAPI document describes them."""

from __future__ import annotations

from typing import Any

EVENT_STREAM = "text/event-stream"

Responses = dict[int | str, dict[str, Any]]

FILE: Responses = {
    200: {
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        "description": "The file.",
    }
}
SERVER_EVENTS = {EVENT_STREAM: {"schema": {"type": "string"}}}
PAGE_OR_STREAM: Responses = {200: {"content": SERVER_EVENTS, "description": "A page, or a stream."}}
STREAM: Responses = {
    200: {
        "content": SERVER_EVENTS,
        "description": "Server-sent events. The data of `status` is a StreamedStatus, of what a job says a StreamedEvent.",
    }
}
