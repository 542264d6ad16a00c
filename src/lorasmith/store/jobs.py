"""The queue: jobs in order, one holder each. Every step is one transaction that all processes see in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, text
from sqlalchemy.orm import Session

from lorasmith.errors import Conflict, LostLease, NotFound
from lorasmith.faults import fault_point
from lorasmith.schemas.jobs import ACTIVE, Job, JobKind, JobStatus
from lorasmith.store.database import JobRecord, reading, transaction
from lorasmith.store.leases import LEASE_S, Lease, boot_id, uptime
from lorasmith.store.records import Table

LIGHT_AT_ONCE = 2  # exports, previews and estimates take minutes at most; they do not wait for training


class JobTable(Table[Job]):
    """Rows of jobs. `Job.status` and a few more fields are columns too, written together with the document."""

    def columns(self, row: Job) -> dict[str, Any]:
        queue = {"kind": row.kind, "status": row.status, "priority": row.priority, "lane": row.lane, "cores": row.cores}
        return {**super().columns(row), **queue}

    def add_held(self, job: Job, holder: str) -> Lease:
        """Insert a job that this process runs itself: no worker sees it free."""
        with transaction(self.engine) as session:
            stored = JobRecord(**self.columns(job), lease_token=0)
            session.add(stored)
            session.flush()
            return lend(stored, holder)

    def change(self, job_id: str, change: Callable[[Job], None], *, lease: Lease | None = None) -> Job:
        """Read a job, change it and write it, as one step.

        With a lease the step is refused (`LostLease`) when another process has taken the job since.
        """
        with transaction(self.engine) as session:
            stored = required(session, job_id)
            if lease is not None:
                check_lease(stored, lease)
            job = Job.model_validate_json(stored.document)
            change(job)
            self.write(stored, job)
            session.flush()
            fault_point("job.changing")
        return job

    def newest(
        self,
        *,
        limit: int | None,
        after: str | None = None,
        statuses: set[JobStatus] | None = None,
        kind: JobKind | None = None,
    ) -> list[Job]:
        """At most `limit` jobs (None: all of them), newest first, from behind the job `after`."""
        statement = select(JobRecord.document).order_by(JobRecord.id.desc()).limit(limit)
        if after is not None:
            statement = statement.where(JobRecord.id < after)
        if statuses is not None:
            statement = statement.where(JobRecord.status.in_(statuses))
        if kind is not None:
            statement = statement.where(JobRecord.kind == kind)
        with reading(self.engine) as session:
            return [Job.model_validate_json(document) for document in session.scalars(statement)]

    def names_of(self, statuses: set[JobStatus], kind: JobKind) -> set[str]:
        statement = select(JobRecord.name).where(JobRecord.status.in_(statuses), JobRecord.kind == kind)
        with reading(self.engine) as session:
            return set(session.scalars(statement))

    def counts(self) -> dict[str, int]:
        """How many jobs there are in each status."""
        statement = select(JobRecord.status, func.count().label("jobs")).group_by(JobRecord.status)
        with reading(self.engine) as session:
            return {row.status: row.jobs for row in session.execute(statement)}

    def take(self, job_id: str, holder: str, allowed: set[JobStatus]) -> tuple[Job, Lease]:
        """Hold one job whatever else runs. Raises `Conflict` when another process does, or its status is not allowed."""
        with transaction(self.engine) as session:
            stored = required(session, job_id)
            held_elsewhere = not is_free(stored) and stored.lease_holder != holder
            if held_elsewhere or stored.status not in allowed:
                who = f", held by {stored.lease_holder}" if held_elsewhere else ""
                raise Conflict(f"{job_id} is {stored.status}{who}", hint="lorasmith jobs show says more")
            lease = lend(stored, holder)
            return self.begin(stored), lease

    def claim(self, holder: str, cores: int) -> tuple[Job, Lease] | None:
        """The first queued job that fits beside those that run, now held and begun; None when there is none.

        Higher priority first, then the older. `cores` are all that jobs on the CPU may use together; a job that names
        none takes all. A GPU runs one job. What does not fit blocks its lane, so that small jobs cannot starve it.
        """
        with reading(self.engine) as session:
            if (
                session.scalar(select(JobRecord.id).where(JobRecord.status == JobStatus.QUEUED, free()).limit(1))
                is None
            ):
                return None
        with transaction(self.engine) as session:
            used = lanes_in_use(session, cores)
            waiting = (
                select(JobRecord)
                .where(JobRecord.status == JobStatus.QUEUED, free())
                .order_by(JobRecord.priority.desc(), text("jobs.rowid"))
            )
            blocked: set[str] = set()
            for stored in session.scalars(waiting.execution_options(yield_per=20)):
                if stored.lane in blocked:
                    continue
                need, capacity = demand(stored.lane, stored.cores, cores)
                if used.get(stored.lane, 0) + need > capacity:
                    blocked.add(stored.lane)
                    continue
                lease = lend(stored, holder)
                job = self.begin(stored)
                break
            else:
                return None
            session.flush()
            fault_point("job.claiming")
        fault_point("job.claimed")
        return job, lease

    def begin(self, stored: JobRecord) -> Job:
        job = Job.model_validate_json(stored.document)
        job.status = JobStatus.PREPARING if job.kind is JobKind.TRAINING else JobStatus.RUNNING
        self.write(stored, job)
        return job

    def lease_of(self, job_id: str) -> tuple[int, str | None]:
        """The job's newest token, and who got it."""
        with reading(self.engine) as session:
            stored = required(session, job_id)
            return stored.lease_token, stored.lease_holder

    def abandoned(self) -> list[Job]:
        """Begun jobs that nobody answers for any more."""
        with reading(self.engine) as session:
            documents = session.scalars(select(JobRecord.document).where(JobRecord.status.in_(ACTIVE), free())).all()
        return [Job.model_validate_json(document) for document in documents]

    def adopt(self, holder: str, job_id: str) -> tuple[Job, Lease] | None:
        """Hold an abandoned job; None when another process was faster."""
        with transaction(self.engine) as session:
            stored = session.scalar(
                select(JobRecord).where(JobRecord.id == job_id, JobRecord.status.in_(ACTIVE), free())
            )
            if stored is None:
                return None
            taken = Job.model_validate_json(stored.document), lend(stored, holder)
            session.flush()
            fault_point("job.adopting")
        fault_point("job.adopted")
        return taken

    def renew(self, leases: list[Lease]) -> list[Lease]:
        """Hold them for `LEASE_S` from now on; returns those that another process has taken."""
        lost = []
        with transaction(self.engine) as session:
            for lease in leases:
                stored = session.get(JobRecord, lease.job_id)
                if stored is None or stored.lease_token != lease.token:
                    lost.append(lease)
                else:
                    extend(stored, LEASE_S)
            session.flush()
            fault_point("lease.renewing")
        fault_point("lease.renewed")
        return lost

    def release(self, lease: Lease, *, after_s: float = 0.0) -> None:
        """Let others take the job, at once or when so much time has gone by. A lost lease is released already."""
        with transaction(self.engine) as session:
            stored = session.get(JobRecord, lease.job_id)
            if stored is not None and stored.lease_token == lease.token:
                stored.lease_holder = None
                extend(stored, after_s)
        fault_point("job.released")


def required(session: Session, job_id: str) -> JobRecord:
    stored = session.get(JobRecord, job_id)
    if stored is None:
        raise NotFound(f"job {job_id} has been removed")
    return stored


def check_lease(stored: JobRecord, lease: Lease) -> None:
    if stored.lease_token != lease.token:
        raise LostLease(
            f"{stored.id} is answered for by {stored.lease_holder or 'nobody'} now, no longer by {lease.holder}",
            hint=f"lorasmith jobs show {stored.id}",
        )


def lend(stored: JobRecord, holder: str) -> Lease:
    stored.lease_token += 1
    stored.lease_holder = holder
    extend(stored, LEASE_S)
    return Lease(stored.id, stored.lease_token, holder)


def extend(stored: JobRecord, seconds: float) -> None:
    stored.lease_boot, stored.lease_until = boot_id(), uptime() + seconds


def is_free(stored: JobRecord) -> bool:
    return stored.lease_boot != boot_id() or stored.lease_until <= uptime()


def free() -> ColumnElement[bool]:
    """`is_free` in SQL; a row that was never held has no boot."""
    return or_(JobRecord.lease_boot.is_(None), JobRecord.lease_boot != boot_id(), JobRecord.lease_until <= uptime())


def lanes_in_use(session: Session, cores: int) -> dict[str, int]:
    used: dict[str, int] = {}
    running = select(JobRecord.lane, JobRecord.cores).where(JobRecord.status.in_(ACTIVE))
    for lane, wanted in session.execute(running):
        used[lane] = used.get(lane, 0) + demand(lane, wanted, cores)[0]
    return used


def demand(lane: str, wanted: int | None, cores: int) -> tuple[int, int]:
    """How much of a lane a job takes, and how much the lane has."""
    if lane == "cpu":
        return min(wanted or cores, cores), cores
    return 1, LIGHT_AT_ONCE if lane == "light" else 1
