"""How fast and how much: rate limits as token buckets, pauses between attempts, and a budget that is not overdrawn."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

LONGEST_PAUSE_S = 60.0
BYTES_PER_TOKEN = 3  # of a text whose tokens nobody has counted; English has about 4, most other scripts fewer

Clock = Callable[[], float]
Pause = Callable[[float], Awaitable[None]]


class BudgetSpent(Exception):
    """The next request would go beyond the budget; says which one."""


class Bucket:
    """A token bucket that fills with `per_minute` / 60 a second and holds one second's worth, at least 1.

    A minute's worth would allow twice the limit within the first minute. What costs more than the bucket holds waits
    until it is full and leaves a debt.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self.rate = per_minute / 60.0
        self.capacity = max(1.0, self.rate)
        self.level = self.capacity
        self.at = now

    def fill(self, now: float) -> None:
        self.level = min(self.capacity, self.level + (now - self.at) * self.rate)
        self.at = now

    def delay_s(self, cost: float, now: float) -> float:
        """Seconds until `cost` may be taken."""
        self.fill(now)
        return max(0.0, (min(cost, self.capacity) - self.level) / self.rate)

    def take(self, cost: float) -> None:
        self.level -= cost


class RateLimit:
    """Requests and tokens per minute, shared by all that ask. `pause` may raise, to leave the queue."""

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None, clock: Clock) -> None:
        self.clock = clock
        self.requests = Bucket(requests_per_minute, clock()) if requests_per_minute else None
        self.tokens = Bucket(tokens_per_minute, clock()) if tokens_per_minute else None
        self.held_until = 0.0
        self.turn = asyncio.Lock()  # first come, first served

    async def wait(self, tokens: int, pause: Pause) -> None:
        """Return when a request of so many tokens may be sent."""
        costs = [(bucket, cost) for bucket, cost in ((self.requests, 1.0), (self.tokens, float(tokens))) if bucket]
        async with self.turn:
            while True:
                now = self.clock()
                delay = max([self.held_until - now, *(bucket.delay_s(cost, now) for bucket, cost in costs)])
                if delay <= 0:
                    break
                await pause(delay)
            for bucket, cost in costs:
                bucket.take(cost)

    def hold(self, seconds: float) -> None:
        """Nobody asks for so long: the endpoint said so."""
        self.held_until = max(self.held_until, self.clock() + seconds)

    def correct(self, estimated: int, actual: int) -> None:
        """Give back, or take, what the estimate of a request's tokens was wrong by."""
        if self.tokens:
            self.tokens.take(actual - estimated)


class Budget:
    """Requests and tokens of a whole job. What is under way is reserved, so that the sum stays within the budget."""

    def __init__(self, requests: int | None, tokens: int | None, *, spent_requests: int, spent_tokens: int) -> None:
        self.requests = requests
        self.tokens = tokens
        self.spent_requests = spent_requests
        self.spent_tokens = spent_tokens
        self.reserved = 0
        self.changed = asyncio.Condition()

    async def reserve(self, tokens: int) -> None:
        """Count one request and set its tokens aside; waits for those under way where only they stand in between."""
        async with self.changed:
            while True:
                if self.requests is not None and self.spent_requests >= self.requests:
                    raise BudgetSpent(f"{self.requests:,} requests")
                if self.tokens is None or self.spent_tokens + self.reserved + tokens <= self.tokens:
                    break
                if not self.reserved:
                    raise BudgetSpent(f"{self.tokens:,} tokens ({self.spent_tokens:,} are spent)")
                await self.changed.wait()
            self.spent_requests += 1
            self.reserved += tokens

    async def give_back(self, tokens: int) -> None:
        """Undo `reserve`: the request is not sent."""
        async with self.changed:
            self.spent_requests -= 1
            self.reserved -= tokens
            self.changed.notify_all()

    async def settle(self, reserved: int, spent: int) -> None:
        async with self.changed:
            self.reserved -= reserved
            self.spent_tokens += spent
            self.changed.notify_all()


def pause_s(attempt: int, base_s: float, chance: random.Random) -> float:
    """Before attempt `attempt` + 1: exponential backoff with full jitter (AWS Architecture Blog, Brooker 2015)."""
    return chance.uniform(0.0, min(LONGEST_PAUSE_S, base_s * 2.0 ** (attempt - 1)))


def estimated_tokens(text: str) -> int:
    return -(-len(text.encode()) // BYTES_PER_TOKEN)
