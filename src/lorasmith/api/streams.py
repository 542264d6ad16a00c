"""What the streams of jobs say, from any point on: `Last-Event-ID` is a number of the job's own events or bytes of its log.

Each yields chunks of frames, and an empty one whenever it has looked and found nothing.
"""

from __future__ import annotations

import re

from starlette.concurrency import run_in_threadpool

from lorasmith.api.event_streams import Chunks, frame
from lorasmith.api.feeds import BATCH, MOST_GOING, Feed, Feeds
from lorasmith.api.problems import without_paths
from lorasmith.jobs.log import lines_after
from lorasmith.schemas.api_jobs import LogLine, StreamedEvent, StreamedStatus
from lorasmith.schemas.jobs import Event, Job, JobStatus

RESET, END = frame("reset", "{}"), frame("end", "{}")
MOST_WRITTEN = 1000
WRITTEN: dict[tuple[str, int, bool], bytes] = {}  # newest events as frames: hundreds of readers get the same


def last_number(given: str) -> int | None:
    """What a `Last-Event-ID` says; None where it says nothing that was ever sent."""
    return int(given) if given.isascii() and given.isdigit() and len(given) < 16 else None


async def job_events(feeds: Feeds, job: Job, after: int | None, types: set[str] | None) -> Chunks:
    """A job's status whenever it changes and its events of some types, until it stops."""
    async with feeds.following(job) as feed:
        if after is None or after > feed.seq:
            yield RESET
            after = 0
        told = None
        while True:
            changed, goes_on = feeds.changed, feed.goes_on
            if goes_on and feed.job.status is not told:
                told = feed.job.status
                yield status_frame(feeds, feed.job)
            events = await feed.since(after)
            if events:
                after = events[-1].seq
                asked = (event for event in events if types is None or event.type in types)
                yield b"".join(event_frame(job.id, event, str(event.seq)) for event in asked)
            elif goes_on:
                await changed.wait()
                yield b""
            else:
                yield status_frame(feeds, feed.job) + END  # behind the last event
                return


async def log_lines(feeds: Feeds, job: Job, after: int | None) -> Chunks:
    """Lines of the job's log, until it stops."""
    async with feeds.following(job) as feed:
        if after is None or after > feed.sizes[1]:
            yield RESET
            after = 0
        while True:
            changed, goes_on = feeds.changed, feed.goes_on
            lines = await run_in_threadpool(lines_after, feed.log_file, after, BATCH)
            if lines:
                after = lines[-1][0]
                yield b"".join(log_frame(offset, text) for offset, text in lines)
            elif goes_on:
                await changed.wait()
                yield b""
            else:
                yield END
                return


async def all_events(feeds: Feeds, cursor: dict[str, int]) -> Chunks:
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
                seqs.setdefault(job_id, feed.seq)
                if told.get(job_id) is not feed.job.status and feed.goes_on:
                    told[job_id] = feed.job.status
                    yield status_frame(feeds, feed.job)
                while events := await feed.since(seqs[job_id]):
                    frames = []
                    for event in events:
                        seqs[job_id] = event.seq
                        frames.append(event_frame(job_id, event, cursor_text(seqs, told), named=True))
                    yield b"".join(frames)
                if not feed.goes_on and told.pop(job_id, None) is not None:
                    yield status_frame(feeds, feed.job)
            await changed.wait()
            yield b""


async def ended_feed(feeds: Feeds, job_id: str) -> Feed | None:
    """A job that nobody looks at any more, as it is now; None when its row has been removed."""
    job = await run_in_threadpool(feeds.workbench.jobs.get, job_id)
    return None if job is None else await run_in_threadpool(Feed, feeds.workbench, job)


def status_frame(feeds: Feeds, job: Job) -> bytes:
    reason = without_paths(job.reason, feeds.workbench.home) if job.reason else None
    status = StreamedStatus(job_id=job.id, status=job.status, reason_code=job.reason_code, reason=reason)
    return frame("status", status.model_dump_json())


def log_frame(offset: int, text: str) -> bytes:
    return frame("log", LogLine(offset=offset, text=text).model_dump_json(), str(offset))


def event_frame(job_id: str, event: Event, cursor: str, *, named: bool = False) -> bytes:
    """`named`: the data say of which job it is."""
    key = (job_id, event.seq, named)
    if key not in WRITTEN:
        of_job = {"job_id": job_id} if named else {}
        data = StreamedEvent(**of_job, **event.model_dump()).model_dump_json(exclude_unset=True)
        WRITTEN[key] = frame(event.type, data)
        if len(WRITTEN) > MOST_WRITTEN:
            del WRITTEN[next(iter(WRITTEN))]
    return b"id: %s\n%s" % (cursor.encode(), WRITTEN[key])


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
