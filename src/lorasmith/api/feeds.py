"""What readers of jobs share: one look at each followed job serves all who follow it.

Nothing is queued for a reader. Each has a number, the last event that it was sent, and the job's file has the rest.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import takewhile
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from lorasmith.errors import NotFound
from lorasmith.jobs.events import events_after, last_seq
from lorasmith.jobs.folder import EVENTS, LOG
from lorasmith.schemas.jobs import ACTIVE, Event, Job, JobStatus
from lorasmith.services.workbench import Workbench

LOOK_S = 0.2
WAKE_S = 5.0  # readers are woken at least so often, for their heartbeats
AGAIN_S = 10.0  # between two looks at a job that could not be read
BATCH = 500
KEPT = 1000  # newest events of a job in memory, for readers that are not far behind
MOST_GOING = 200  # jobs that one stream of all follows
GOING = {JobStatus.QUEUED, *ACTIVE}

log = logging.getLogger(__name__)


class Feed:
    """A followed job: its row, and its events since somebody follows it."""

    def __init__(self, workbench: Workbench, job: Job) -> None:
        self.workbench, self.job = workbench, job
        self.events_file, self.log_file = (workbench.path(job.folder) / name for name in (EVENTS, LOG))
        self.seq = last_seq(self.events_file)
        self.sizes = file_size(self.events_file), file_size(self.log_file)
        # All events after a number; a look, in another thread than the readers, replaces both at once.
        self.kept: tuple[int, list[Event]] = self.seq, []
        self.readers = 0
        self.gone = False  # its row has been removed

    def look(self) -> bool:
        """Read what is new; whether there was anything. The row comes last: when it says the end, all events are there."""
        before = self.sizes, self.job.status
        sizes = file_size(self.events_file), file_size(self.log_file)
        if sizes[0] != self.sizes[0]:
            self.keep(events_after(self.events_file, self.seq, KEPT))
        self.sizes = sizes
        try:
            self.job = self.workbench.jobs.require(self.job.id)
        except NotFound:
            self.gone = True
            return True
        return before != (self.sizes, self.job.status)

    def keep(self, new: list[Event]) -> None:
        complete_from, events = self.kept
        events = [*events, *new]
        dropped = len(events) - KEPT
        if dropped > 0:
            complete_from, events = events[dropped - 1].seq, events[dropped:]
        self.kept = complete_from, events
        self.seq = events[-1].seq if events else self.seq

    async def since(self, seq: int) -> list[Event]:
        """At most `BATCH` events after that number."""
        complete_from, events = self.kept
        if seq >= complete_from:
            new = list(takewhile(lambda event: event.seq > seq, reversed(events)))
            return new[: -BATCH - 1 : -1]
        return await run_in_threadpool(events_after, self.events_file, seq, BATCH)

    @property
    def goes_on(self) -> bool:
        return self.job.status in GOING and not self.gone


class Feeds:
    """The followed jobs of a server.

    `changed` is set, and replaced by a new one, after each look that found something, and else every `WAKE_S`.
    """

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self.followed: dict[str, Feed] = {}
        self.held: set[str] = set()  # followed for those who follow all
        self.readers_of_all = 0
        self.changed = asyncio.Event()
        self.wait_until: dict[str, float] = {}  # by job that could not be read

    async def run(self) -> None:
        """Look at what is followed, for as long as the server lives."""
        woken = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                news = await self.look()
            except Exception:  # the database: what one job raises is caught beside it
                log.exception("jobs could not be looked at")
                await asyncio.sleep(AGAIN_S)
                news = True  # for heartbeats
            if news or time.monotonic() - woken >= WAKE_S:
                woken = time.monotonic()
                self.changed.set()
                self.changed = asyncio.Event()

    async def look(self) -> bool:
        news = False
        if self.readers_of_all or self.held:
            news = await self.follow_going()
        feeds = [feed for job_id, feed in self.followed.items() if self.is_due(job_id)]
        return (bool(feeds) and await run_in_threadpool(self.look_at, feeds)) or news

    def look_at(self, feeds: list[Feed]) -> bool:
        news = False
        for feed in feeds:
            try:
                news = feed.look() or news
            except Exception:
                self.set_aside(feed.job.id)
                news = True  # it may have read something first
            else:
                self.wait_until.pop(feed.job.id, None)
        return news

    def set_aside(self, job_id: str) -> None:
        """Look at the others only, for `AGAIN_S`."""
        log.exception("%s could not be looked at", job_id)
        self.wait_until[job_id] = time.monotonic() + AGAIN_S

    def is_due(self, job_id: str) -> bool:
        return time.monotonic() >= self.wait_until.get(job_id, 0.0)

    async def follow_going(self) -> bool:
        """Hold a feed of each job that waits or runs while somebody follows all; whether there are others than before."""
        jobs = await run_in_threadpool(self.going_jobs) if self.readers_of_all else []
        before, self.held = self.held, self.held & {job.id for job in jobs}
        for job_id in before - self.held:
            self.leave(self.followed[job_id])
        for job in jobs:
            if job.id in self.held or not self.is_due(job.id):
                continue
            try:
                (await self.feed(job)).readers += 1
            except Exception:
                self.set_aside(job.id)
            else:
                self.held.add(job.id)
        return self.held != before

    def going_jobs(self) -> list[Job]:
        return self.workbench.jobs.newest(limit=MOST_GOING, statuses=GOING)

    async def feed(self, job: Job) -> Feed:
        if job.id not in self.followed:
            made = await run_in_threadpool(Feed, self.workbench, job)
            self.followed.setdefault(job.id, made)  # another reader may have been faster
        return self.followed[job.id]

    def leave(self, feed: Feed) -> None:
        feed.readers -= 1
        if feed.readers == 0:
            self.followed.pop(feed.job.id, None)

    @asynccontextmanager
    async def following(self, job: Job) -> AsyncIterator[Feed]:
        """The feed of a job, which is looked at while anybody follows it."""
        feed = await self.feed(job)
        feed.readers += 1
        try:
            yield feed
        finally:
            self.leave(feed)

    @contextmanager
    def following_all(self) -> Iterator[None]:
        self.readers_of_all += 1
        try:
            yield
        finally:
            self.readers_of_all -= 1


def file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
