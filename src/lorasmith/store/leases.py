"""Who answers for a job: a process that renews its lease, on a clock that neither a reset nor a sleep moves."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEASE_S = 10.0  # a dead holder is noticed after this and one look at the queue


@dataclass(frozen=True)
class Lease:
    """`token` grows with each holder of the job: a change that comes with an older one is refused (`LostLease`)."""

    job_id: str
    token: int
    holder: str


@cache
def boot_id() -> str:
    """Names this start of the machine: leases of an earlier one are over."""
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="ascii").strip() if path.exists() else ""


def uptime() -> float:
    """Seconds, the same in all processes; it stands still while the machine sleeps, so that no lease ends meanwhile."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)
