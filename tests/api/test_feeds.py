"""One followed job that cannot be read, or that is gone, leaves the others followed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest

from lorasmith.api import feeds as feeds_module
from lorasmith.api.feeds import Feed, Feeds
from lorasmith.files import append_lines
from lorasmith.jobs.folder import EVENTS
from lorasmith.schemas.jobs import Event, Job, JobKind, now
from lorasmith.services.jobs import create_job
from lorasmith.services.workbench import Workbench


@pytest.fixture
def jobs(workbench: Workbench) -> list[Job]:
    return [create_job(workbench, JobKind.EXPORT, name, {}, {}) for name in ("broken", "sound")]


def say(workbench: Workbench, job: Job, seq: int) -> None:
    append_lines(workbench.path(job.folder) / EVENTS, [Event(seq=seq, time=now(), type="step").model_dump_json()])


def break_events(workbench: Workbench, job: Job) -> None:
    (workbench.path(job.folder) / EVENTS).mkdir()


async def until(reached: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not reached():
            await asyncio.sleep(0.01)


def while_feeds_run(workbench: Workbench, scenario: Callable[[Feeds], Awaitable[None]]) -> None:
    async def run() -> None:
        feeds = Feeds(workbench)
        looking = asyncio.create_task(feeds.run())
        await scenario(feeds)
        looking.cancel()
        with suppress(asyncio.CancelledError):
            await looking

    asyncio.run(run())


def test_a_job_that_cannot_be_read_any_more_is_set_aside(workbench: Workbench, jobs: list[Job]) -> None:
    broken, sound = jobs

    async def scenario(feeds: Feeds) -> None:
        async with feeds.following(broken), feeds.following(sound) as feed:
            break_events(workbench, broken)
            for seq in (1, 2):
                say(workbench, sound, seq)
                await until(lambda seq=seq: feed.seq == seq)

    while_feeds_run(workbench, scenario)


def test_readers_of_all_follow_what_can_be_read_and_later_the_rest(
    workbench: Workbench, jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds_module, "AGAIN_S", 0.1)
    broken, sound = jobs
    break_events(workbench, broken)

    async def scenario(feeds: Feeds) -> None:
        with feeds.following_all():
            await until(lambda: feeds.held == {sound.id})
            (workbench.path(broken.folder) / EVENTS).rmdir()
            await until(lambda: feeds.held == {broken.id, sound.id})
            assert [feed.readers for feed in feeds.followed.values()] == [1, 1]
        await until(lambda: not feeds.followed)

    while_feeds_run(workbench, scenario)


def test_a_job_whose_row_is_removed_goes_on_no_more(workbench: Workbench, jobs: list[Job]) -> None:
    gone, sound = jobs

    async def scenario(feeds: Feeds) -> None:
        async with feeds.following(gone) as lost, feeds.following(sound) as feed:
            workbench.jobs.remove(gone.id)
            await until(lambda: not lost.goes_on)
            say(workbench, sound, 1)
            await until(lambda: feed.seq == 1)
            assert feed.goes_on

    while_feeds_run(workbench, scenario)


def test_events_that_come_while_a_reader_takes_the_known_ones_are_left_for_its_next_turn(
    workbench: Workbench, jobs: list[Job]
) -> None:
    feed = Feed(workbench, jobs[0])
    say(workbench, jobs[0], 1)
    feed.look()

    class Number(int):
        """Compared with an event, it lets the next one come."""

        def __lt__(self, other: int) -> bool:
            if feed.seq == 1:
                say(workbench, jobs[0], 2)
                feed.look()
            return int(self) < other

    assert [event.seq for event in asyncio.run(feed.since(Number(0)))] == [1]
    assert [event.seq for event in asyncio.run(feed.since(1))] == [2]
