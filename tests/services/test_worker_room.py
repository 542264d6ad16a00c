"""When a job goes on that a full disk has paused, on real small disks."""

from __future__ import annotations

import pytest

from lorasmith.schemas.jobs import Job, JobKind, JobStatus
from lorasmith.services.jobs import create_job
from lorasmith.services.workbench import Workbench
from lorasmith.services.worker import ROOM_BYTES, Worker
from tests.conftest import mounted

MB = 1_000_000


def paused_for_room(workbench: Workbench, needed_bytes: int | None = None) -> Job:
    def pause(job: Job) -> None:
        job.status, job.reason_code, job.needed_bytes = JobStatus.PAUSED, "disk_full", needed_bytes

    return workbench.jobs.change(create_job(workbench, JobKind.TRAINING, "full", {}, {}).id, pause)


def goes_on(workbench: Workbench, job: Job) -> bool:
    Worker(workbench, 1, lambda job, text: None).wake_for_room()
    return workbench.jobs.require(job.id).status is JobStatus.QUEUED


@pytest.mark.parametrize(
    ("disk_mb", "needed_bytes", "checkpoint_bytes", "woken"),
    [
        (30, None, 0, True),
        (30, 10 * MB, 0, True),
        (30, 20 * MB, 0, False),  # and not every 30 s, to fail again
        (10, None, 0, False),  # however much is free at the home
        (40, None, 9 * MB, False),  # the next checkpoint, while this one is still there
        (60, None, 9 * MB, True),
    ],
)
def test_a_paused_job_goes_on_where_its_own_disk_has_room_for_what_it_needs(
    workbench: Workbench, disk_mb: int, needed_bytes: int | None, checkpoint_bytes: int, woken: bool
) -> None:
    assert ROOM_BYTES == 16 * MB
    job = paused_for_room(workbench, needed_bytes)
    with mounted(workbench.path(job.folder), megabytes=disk_mb):
        if checkpoint_bytes:
            checkpoint = workbench.path(job.folder) / "checkpoints" / "step-000002"
            checkpoint.mkdir(parents=True)
            (checkpoint / "manifest.json").write_text("{}", encoding="utf-8")
            (checkpoint / "state.safetensors").write_bytes(bytes(checkpoint_bytes))
        assert goes_on(workbench, job) is woken


def test_the_oldest_of_many_paused_jobs_goes_on_and_one_without_a_folder_holds_up_none(workbench: Workbench) -> None:
    oldest = paused_for_room(workbench)
    lost = paused_for_room(workbench)
    workbench.path(lost.folder).rename(workbench.home / "elsewhere")
    asleep = {"status": JobStatus.PAUSED, "reason_code": "paused"}
    workbench.jobs.save(*(oldest.model_copy(update={"id": f"job_Z{number:03}", **asleep}) for number in range(120)))
    assert goes_on(workbench, oldest)
    assert workbench.jobs.require(lost.id).status is JobStatus.PAUSED
    assert workbench.jobs.counts() == {"queued": 1, "paused": 121}
