"""What an unfinished job still reads may not be removed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from lorasmith.errors import Conflict
from lorasmith.schemas.jobs import ENDED, JobStatus

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy

# Held from the choice of what a job reads, and of its name, to its row: no other thread removes or takes these between.
USES = threading.RLock()


def refuse_while_used(workbench: Workbench, noun: str, name: str, fields: Mapping[str, Collection[str | None]]) -> None:
    """Raise `Conflict` naming a job that has not ended and whose spec has one of the values in one of the fields."""
    from lorasmith.services.jobs import settle_abandoned

    settle_abandoned(workbench)
    for job in workbench.jobs.newest(limit=sys.maxsize, statuses=set(JobStatus) - ENDED):
        if any(job.spec.get(field) in values for field, values in fields.items()):
            raise Conflict(
                f"the {noun} {name!r} is in use: {job.kind} {job.id} is {job.status}",
                hint=f"wait for it, or lorasmith jobs cancel {job.id}",
            )
