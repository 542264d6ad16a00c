"""Retries of clients that send no `Idempotency-Key`: OpenAI's count theirs in a header, and mean one job by all of them."""

from __future__ import annotations

import time

REMEMBERED_S = 60.0


class Retries:
    """Which job a request has made, for as long as a client may still send it again."""

    def __init__(self) -> None:
        self.made: dict[str, tuple[float, str]] = {}

    def note(self, digest: str, job_id: str) -> None:
        now = time.monotonic()
        self.made = {key: made for key, made in self.made.items() if now - made[0] < REMEMBERED_S}
        self.made[digest] = now, job_id

    def answer(self, digest: str) -> str | None:
        """The job of the same request within the last minute."""
        at, job_id = self.made.get(digest, (0.0, None))
        return job_id if job_id and time.monotonic() - at < REMEMBERED_S else None
