"""A teacher: asked within its limits and its budget, again after a pause where that may help, and never twice for an
answer that it has given."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time

from lorasmith.endpoints import parse_endpoint, read_key
from lorasmith.engine.teachers.client import Messages, NoAnswer, TeacherClient
from lorasmith.engine.teachers.ledger import RequestLedger
from lorasmith.engine.teachers.limits import Budget, RateLimit, estimated_tokens, pause_s
from lorasmith.schemas.teachers import Answered, Asked, Reach, TeacherSpec, Unanswered


class Stopping(Exception):
    """The job is asked to stop, and this request has not been sent."""


class Teacher:
    """Use as an async context manager, inside the running loop."""

    def __init__(self, spec: TeacherSpec, reach: Reach, ledger: RequestLedger) -> None:
        self.spec = spec
        self.ledger = ledger
        self.endpoint = parse_endpoint(spec.endpoint)
        self.client = TeacherClient(spec, self.endpoint, reach, read_key(spec.api_key_env, os.environ))
        self.limit = RateLimit(spec.requests_per_minute, spec.tokens_per_minute, time.monotonic)
        self.budget = Budget(
            spec.budget_requests, spec.budget_tokens, spent_requests=ledger.asked, spent_tokens=ledger.tokens
        )
        self.stopping = asyncio.Event()
        self.chance = random.Random()

    async def __aenter__(self) -> Teacher:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.client.aclose()

    async def ask(self, request: str, messages: Messages) -> Answered:
        """The answer to a request, from the ledger where it stands there.

        Raises `NoAnswer` when every attempt has failed, `BudgetSpent`, `Stopping`, and `TeacherFailed` where asking
        anything else would be in vain.
        """
        known = self.ledger.answers.get(request)
        if known is not None:
            return known
        prompt_tokens = estimated_tokens(json.dumps(messages, ensure_ascii=False))
        cost = prompt_tokens + self.spec.max_tokens
        attempt = 0
        while True:
            attempt += 1
            await self.limit.wait(cost, self.pause)
            await self.budget.reserve(cost)
            if self.stopping.is_set():  # while it waited for the budget
                await self.budget.give_back(cost)
                raise Stopping
            spent = 0
            try:
                self.ledger.add(Asked(request=request, attempt=attempt))
                answer = await self.attempt(request, messages, prompt_tokens)
                spent = answer.prompt_tokens + answer.completion_tokens
                return answer
            except NoAnswer as failure:
                self.ledger.add(
                    Unanswered(request=request, attempt=attempt, reason=failure.reason, sentence=failure.sentence)
                )
                if not failure.again or attempt == self.spec.max_attempts:
                    raise
                delay = max(pause_s(attempt, self.spec.retry_base_s, self.chance), failure.wait_s or 0.0)
                if failure.reason == "rate-limited":
                    self.limit.hold(delay)
            finally:
                await self.budget.settle(cost, spent)
                self.limit.correct(cost, spent)
            await self.pause(delay)

    async def attempt(self, request: str, messages: Messages, prompt_tokens: int) -> Answered:
        began = time.monotonic()
        answer = await self.client.ask(messages)
        counted = answer.prompt_tokens is not None and answer.completion_tokens is not None
        line = Answered(
            request=request,
            text=answer.text,
            finish_reason=answer.finish_reason,
            prompt_tokens=prompt_tokens if answer.prompt_tokens is None else answer.prompt_tokens,
            completion_tokens=(
                estimated_tokens(answer.text) if answer.completion_tokens is None else answer.completion_tokens
            ),
            estimated=not counted,
            model=answer.model,
            seconds=round(time.monotonic() - began, 3),
        )
        self.ledger.add(line)
        return line

    async def pause(self, seconds: float) -> None:
        """Sleep, or raise `Stopping` as soon as the job is asked to stop."""
        try:
            await asyncio.wait_for(self.stopping.wait(), seconds)
        except TimeoutError:
            return
        raise Stopping
