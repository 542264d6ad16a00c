"""Keeping leases while a job runs: a thread renews them, so that neither a stopped terminal nor a long copy loses one."""

from __future__ import annotations

import logging
import os
import socket
import threading
from types import TracebackType

from lorasmith.errors import LorasmithError
from lorasmith.jobs.processes import process_started
from lorasmith.store.jobs import JobTable
from lorasmith.store.leases import LEASE_S, Lease

RENEW_S = LEASE_S / 3

log = logging.getLogger(__name__)


def holder() -> str:
    """This process's name on its leases."""
    return f"{socket.gethostname()}:{os.getpid()}:{process_started(os.getpid())}"


class LeaseKeeper:
    """Renews what it holds until it is left. Use as a context manager."""

    def __init__(self, jobs: JobTable, *leases: Lease) -> None:
        self.jobs = jobs
        self.held = set(leases)
        self.lost: set[Lease] = set()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.renew, name="leases", daemon=True)

    def __enter__(self) -> LeaseKeeper:
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.ended.set()
        self.thread.join()

    def add(self, lease: Lease) -> None:
        self.held.add(lease)

    def drop(self, lease: Lease) -> None:
        self.held.discard(lease)

    def renew(self) -> None:
        while not self.ended.wait(RENEW_S):
            try:
                self.renew_once()
            except LorasmithError as error:
                log.warning("leases could not be renewed: %s", error.message)  # the token guards what comes after
            except Exception:  # without this thread every job would be lost, one lease later
                log.exception("leases could not be renewed")

    def renew_once(self) -> None:
        lost = self.jobs.renew(list(self.held)) if self.held else []
        self.held.difference_update(lost)
        self.lost.update(lost)
