"""`lorasmith worker`"""

from __future__ import annotations

import os
import signal
import threading
from typing import Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import console_err
from lorasmith.schemas.jobs import Job


def worker(
    context: typer.Context,
    cores: Annotated[
        int | None, typer.Option(min=1, help="CPU cores that its jobs may use together; without it, all")
    ] = None,
) -> None:
    """Run queued jobs until Ctrl-C; what runs then goes on, and the next worker follows it"""
    from lorasmith.services.worker import Worker

    workbench = open_workbench(context)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    budget = cores or os.cpu_count() or 1
    console_err().print(f"worker {os.getpid()} runs the jobs of {workbench.home} on {budget} cores", markup=False)
    Worker(workbench, budget, tell).run(stop.wait)
    left = [job.id for job in workbench.jobs.abandoned() if job.pid]
    if left:
        console_err().print(f"goes on without a worker: {', '.join(left)}", markup=False)


def tell(job: Job, text: str) -> None:
    console_err().print(f"{job.id} {job.name}: {text}", markup=False)
