"""Server-sent events of jobs, from any point on: `Last-Event-ID` is a number of the job's own events or bytes of its log."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from lorasmith.api.feeds import BATCH, MOST_GOING, Feed, Feeds
from lorasmith.api.problems import without_paths
from lorasmith.jobs.log import lines_after
from lorasmith.schemas.api_jobs import LogLine, StreamedEvent, StreamedStatus
from lorasmith.schemas.jobs import Event, Job, JobStatus

HEARTBEAT_S = 15
SEND_TIMEOUT_S = 10.0  # a reader that takes nothing for so long is gone
RECHECK_S = 30.0  # between two looks at a reader's credentials

MOST_WRITTEN = 1000
WRITTEN: dict[tuple[str, int, bool], str] = {}  # newest events as text: hundreds of readers get the same

ServerEvent = dict[str, Any]
Events = AsyncIterator[ServerEvent]


def respond(events: Events) -> EventSourceResponse:
    """Heartbeats keep proxies from closing; nothing is buffered or compressed on the way."""
    headers = {"X-Accel-Buffering": "no", "Cache-Control": "no-store"}
    return EventSourceResponse(events, ping=HEARTBEAT_S, send_timeout=SEND_TIMEOUT_S, headers=headers)


def last_number(given: str) -> int | None:
    """What a `Last-Event-ID` says; None where it says nothing that was ever sent."""
    return int(given) if given.isascii() and given.isdigit() and len(given) < 16 else None


async def wait(feeds: Feeds, changed: asyncio.Event, still_allowed: Callable[[], bool]) -> bool:
    """Until something is new; False when the reader's token or session has ended meanwhile."""
    try:
        async with asyncio.timeout(RECHECK_S):  # wait_for would make a task for each reader and event
            await changed.wait()
    except TimeoutError:
        return still_allowed()
    return True


async def job_events(
    feeds: Feeds, job: Job, after: int | None, types: set[str] | None, still_allowed: Callable[[], bool]
) -> Events:
    """A job's status whenever it changes and its events of some types, until it stops."""
    async with feeds.following(job) as feed:
        if after is None or after > feed.seq:
            yield {"event": "reset", "data": "{}"}
            after = 0
        seq, told = after, None
        while True:
            changed, goes_on = feeds.changed, feed.goes_on
            if goes_on and feed.job.status is not told:
                told = feed.job.status
                yield status_event(feeds, feed.job)
            events = await feed.since(seq)
            for event in events:
                seq = event.seq
                if types is None or event.type in types:
                    yield sent(job.id, event, str(seq))
            if not events and not goes_on:
                yield status_event(feeds, feed.job)  # behind the last event
                yield {"event": "end", "data": "{}"}
                return
            if not events and not await wait(feeds, changed, still_allowed):
                return


async def log_lines(feeds: Feeds, job: Job, after: int | None, still_allowed: Callable[[], bool]) -> Events:
    """Lines of the job's log, until it stops."""
    async with feeds.following(job) as feed:
        if after is None or after > feed.sizes[1]:
            yield {"event": "reset", "data": "{}"}
            after = 0
        while True:
            changed, goes_on = feeds.changed, feed.goes_on
            lines = await run_in_threadpool(lines_after, feed.log_file, after, BATCH)
            for after, text in lines:
                yield {"event": "log", "id": str(after), "data": LogLine(offset=after, text=text).model_dump_json()}
            if not lines and not goes_on:
                yield {"event": "end", "data": "{}"}
                return
            if not lines and not await wait(feeds, changed, still_allowed):
                return


async def all_events(feeds: Feeds, cursor: dict[str, int], still_allowed: Callable[[], bool]) -> Events:
    """Statuses and events of all jobs that wait or run, for as long as the reader stays.

    `cursor` has the last number that the reader saw of each job; of others it gets what comes from now on.
    """
    told: dict[str, JobStatus] = {}
    seqs = dict(cursor)
    with feeds.following_all():
        while True:
            changed = feeds.changed
            for job_id in dict.fromkeys([*feeds.followed, *told]):
                feed = feeds.followed.get(job_id) or await ended_feed(feeds, job_id)
                if feed is None:
                    told.pop(job_id)
                    continue
                seq = seqs.setdefault(job_id, feed.seq)
                if told.get(job_id) is not feed.job.status and feed.goes_on:
                    told[job_id] = feed.job.status
                    yield status_event(feeds, feed.job)
                while events := await feed.since(seq):
                    for event in events:
                        seq = seqs[job_id] = event.seq
                        yield sent(job_id, event, cursor_text(seqs, told), named=True)
                if not feed.goes_on and told.pop(job_id, None) is not None:
                    yield status_event(feeds, feed.job)
            if not await wait(feeds, changed, still_allowed):
                return


async def ended_feed(feeds: Feeds, job_id: str) -> Feed | None:
    """A job that nobody looks at any more, as it is now; None when its row has been removed."""
    job = await run_in_threadpool(feeds.workbench.jobs.get, job_id)
    return None if job is None else await run_in_threadpool(Feed, feeds.workbench, job)


def status_event(feeds: Feeds, job: Job) -> ServerEvent:
    reason = without_paths(job.reason, feeds.workbench.home) if job.reason else None
    status = StreamedStatus(job_id=job.id, status=job.status, reason_code=job.reason_code, reason=reason)
    return {"event": "status", "data": status.model_dump_json()}


def sent(job_id: str, event: Event, cursor: str, *, named: bool = False) -> ServerEvent:
    """`named`: the data say of which job it is."""
    key = (job_id, event.seq, named)
    if key not in WRITTEN:
        of_job = {"job_id": job_id} if named else {}
        WRITTEN[key] = StreamedEvent(**of_job, **event.model_dump()).model_dump_json(exclude_unset=True)
        if len(WRITTEN) > MOST_WRITTEN:
            del WRITTEN[next(iter(WRITTEN))]
    return {"event": event.type, "id": cursor, "data": WRITTEN[key]}


def cursor_text(seqs: dict[str, int], told: dict[str, JobStatus]) -> str:
    """`job_…:12,job_…:3`: where the reader is in each job that goes on."""
    return ",".join(f"{job_id}:{seq}" for job_id, seq in seqs.items() if job_id in told)


def parse_cursor(text: str) -> dict[str, int]:
    """What `cursor_text` wrote; of anything else, nothing."""
    places = (place.rpartition(":") for place in text.split(",")[:MOST_GOING])
    return {
        job_id: int(seq)
        for job_id, _, seq in places
        if re.fullmatch(r"job_\w{1,40}", job_id) and re.fullmatch(r"\d{1,15}", seq)
    }
