"""The queue's order and the holders of its jobs, against the real database, in one process and in many."""

from __future__ import annotations

import multiprocessing
import sqlite3
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import Busy, Conflict, LostLease
from lorasmith.schemas.jobs import Job, JobKind, JobStatus
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from lorasmith.store import leases
from lorasmith.store.database import DATABASE_NAME, MIGRATION_LOCK
from lorasmith.store.leases import LEASE_S


def job(number: int, **facts: Any) -> Job:
    fields = {"kind": JobKind.TRAINING, "name": f"run-{number}", "spec": {}, "folder": f"jobs/job_{number:04d}"}
    return Job.model_validate({"id": f"job_{number:04d}", **fields, **facts})


def claimed(workbench: Workbench, holder: str = "a", cores: int = 2) -> str | None:
    taken = workbench.jobs.claim(holder, cores)
    return taken[0].id if taken else None


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it with seconds, and so much time has gone by for every lease."""
    passed = [0.0]
    now = leases.uptime
    monkeypatch.setattr("lorasmith.store.jobs.uptime", lambda: now() + passed[0])

    def wait(seconds: float) -> None:
        passed[0] += seconds

    return wait


def test_a_higher_priority_goes_first_then_the_older(workbench: Workbench) -> None:
    for number, priority in enumerate([0, 5, 0, 5]):
        workbench.jobs.add(job(number, priority=priority, cores=1))
    order = [claimed(workbench, cores=4) for _ in range(5)]
    assert order == ["job_0001", "job_0003", "job_0000", "job_0002", None]


def test_jobs_on_the_cpu_share_its_cores_and_a_large_one_is_not_starved(workbench: Workbench) -> None:
    for number, cores in enumerate([1, 2, 1]):
        workbench.jobs.add(job(number, cores=cores))
    assert claimed(workbench) == "job_0000"
    assert claimed(workbench) is None, "job_0001 needs both cores, and job_0002 does not pass it"
    workbench.jobs.change("job_0000", lambda row: setattr(row, "status", JobStatus.COMPLETED))
    assert claimed(workbench) == "job_0001"


def test_a_job_without_a_number_of_cores_takes_all(workbench: Workbench) -> None:
    workbench.jobs.add(job(0))
    workbench.jobs.add(job(1, cores=1))
    assert [claimed(workbench, cores=8) for _ in range(2)] == ["job_0000", None]


def test_a_gpu_runs_one_job_and_light_ones_do_not_wait_for_training(workbench: Workbench) -> None:
    for number in range(2):
        workbench.jobs.add(job(number, device="cuda:0"))
    workbench.jobs.add(job(2, device="cuda:1"))
    for number in range(3, 6):
        workbench.jobs.add(job(number, kind=JobKind.EXPORT))
    assert [claimed(workbench) for _ in range(5)] == ["job_0000", "job_0002", "job_0003", "job_0004", None]


def test_a_job_has_one_holder_until_its_lease_ends(workbench: Workbench, later: Any) -> None:
    workbench.jobs.add(job(0))
    taken = workbench.jobs.claim("a", 2)
    assert taken is not None
    assert workbench.jobs.abandoned() == []
    assert workbench.jobs.adopt("b", "job_0000") is None
    later(LEASE_S - 0.5)
    assert workbench.jobs.renew([taken[1]]) == []
    later(LEASE_S - 0.5)
    assert workbench.jobs.adopt("b", "job_0000") is None, "it was renewed"
    later(1)
    assert [row.id for row in workbench.jobs.abandoned()] == ["job_0000"]
    assert workbench.jobs.adopt("b", "job_0000") is not None


def test_the_former_holder_can_change_nothing(workbench: Workbench, later: Any) -> None:
    workbench.jobs.add(job(0))
    taken = workbench.jobs.claim("a", 2)
    assert taken is not None
    later(LEASE_S + 1)
    adopted = workbench.jobs.adopt("b", "job_0000")
    assert adopted is not None
    with pytest.raises(LostLease, match="job_0000 is answered for by b now, no longer by a"):
        workbench.jobs.change("job_0000", lambda row: setattr(row, "status", JobStatus.FAILED), lease=taken[1])
    assert workbench.jobs.renew([taken[1]]) == [taken[1]]
    workbench.jobs.release(taken[1])
    assert workbench.jobs.abandoned() == [], "the release of a lost lease is nothing"
    assert workbench.jobs.require("job_0000").status is JobStatus.PREPARING


def test_leases_of_an_earlier_start_of_the_machine_are_over(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    workbench.jobs.add(job(0))
    assert claimed(workbench) == "job_0000"
    monkeypatch.setattr("lorasmith.store.jobs.boot_id", lambda: "another start")
    assert [row.id for row in workbench.jobs.abandoned()] == ["job_0000"]


def test_a_release_that_waits_keeps_the_job_from_all(workbench: Workbench, later: Any) -> None:
    workbench.jobs.add(job(0))
    taken = workbench.jobs.claim("a", 2)
    assert taken is not None
    workbench.jobs.change("job_0000", lambda row: setattr(row, "status", JobStatus.QUEUED), lease=taken[1])
    workbench.jobs.release(taken[1], after_s=5)
    assert claimed(workbench, "a") is None
    later(6)
    assert claimed(workbench, "b") == "job_0000"


def test_a_job_of_this_process_is_never_free(workbench: Workbench) -> None:
    workbench.jobs.add_held(job(0), "me")
    assert claimed(workbench, "worker") is None
    with pytest.raises(Conflict, match="job_0000 is queued, held by me"):
        workbench.jobs.take("job_0000", "worker", {JobStatus.QUEUED})
    assert workbench.jobs.take("job_0000", "me", {JobStatus.QUEUED})[0].status is JobStatus.PREPARING


def test_pages_go_back_in_time(workbench: Workbench) -> None:
    for number in range(5):
        workbench.jobs.add(job(number))
    workbench.jobs.change("job_0003", lambda row: setattr(row, "status", JobStatus.FAILED))
    first = workbench.jobs.newest(limit=2)
    assert [row.id for row in first] == ["job_0004", "job_0003"]
    assert [row.id for row in workbench.jobs.newest(limit=9, after=first[-1].id)] == [
        "job_0002",
        "job_0001",
        "job_0000",
    ]
    assert [row.id for row in workbench.jobs.newest(limit=9, statuses={JobStatus.FAILED})] == ["job_0003"]
    assert workbench.jobs.counts() == {"queued": 4, "failed": 1}


def claim_all(home: Path, name: str, start: Any) -> None:
    jobs = Workbench.open(Settings(home=home)).jobs
    start.wait()
    with (home / f"{name}.won").open("w") as won:
        while True:
            with suppress(
                Busy
            ):  # of so many that want to write, one may wait too long, and asks again as a worker does
                if (taken := jobs.claim(name, 1_000_000)) is None:
                    return
                won.write(f"{taken[0].id} {taken[1].token}\n")


def compete(home: Path, processes: int, jobs: int) -> None:
    """Processes that open a home and claim its jobs at once: each job is won once."""
    workbench = Workbench.open(Settings(home=home))
    for number in range(jobs):
        workbench.jobs.add(job(number, cores=1))
    context = multiprocessing.get_context("spawn")
    start = context.Event()
    workers = [context.Process(target=claim_all, args=(home, f"w{n}", start)) for n in range(processes)]
    for worker in workers:
        worker.start()
    start.set()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * processes
    wins = Counter(line for path in home.glob("*.won") for line in path.read_text().splitlines())
    assert wins == {f"job_{number:04d} 1": 1 for number in range(jobs)}


def test_four_processes_start_no_job_twice(tmp_path: Path) -> None:
    compete(tmp_path / "home", processes=4, jobs=60)


@pytest.mark.slow
def test_sixty_four_processes_start_none_of_a_thousand_jobs_twice(tmp_path: Path) -> None:
    compete(tmp_path / "home", processes=64, jobs=1000)


def test_a_database_of_the_first_revision_keeps_its_jobs(tmp_path: Path) -> None:
    home = tmp_path / "home"
    Workbench.open(Settings(home=home)).jobs.add(job(0, status=JobStatus.PAUSED))
    database = sqlite3.connect(home / DATABASE_NAME)
    database.execute("DROP INDEX ix_jobs_status")
    for column in ("kind", "status", "priority", "lane", "cores", "lease_token", "lease_holder", "lease_boot"):
        database.execute(f"ALTER TABLE jobs DROP COLUMN {column}")
    database.execute("ALTER TABLE jobs DROP COLUMN lease_until")
    database.execute("UPDATE alembic_version SET version_num = '0001'")
    database.commit()
    database.close()
    workbench = Workbench.open(Settings(home=home))
    assert [row.id for row in workbench.jobs.newest(limit=5, statuses={JobStatus.PAUSED})] == ["job_0000"]
    assert (home / MIGRATION_LOCK).exists()


def test_a_database_of_a_newer_lorasmith_is_refused(tmp_path: Path) -> None:
    home = tmp_path / "home"
    Workbench.open(Settings(home=home))
    with sqlite3.connect(home / DATABASE_NAME) as database:
        database.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(Conflict, match="was written by a newer lorasmith") as raised:
        Workbench.open(Settings(home=home))
    assert raised.value.hint == "pip install -U lorasmith"
