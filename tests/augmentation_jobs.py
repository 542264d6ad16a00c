"""Augmentation jobs whose engine runs in the process of the test."""

from __future__ import annotations

from lorasmith.engine.augmentation import run
from lorasmith.engine.reporting import Reporter
from lorasmith.files import write_json
from lorasmith.jobs.leases import holder
from lorasmith.schemas.jobs import ACTIVE, Job, JobOrder, JobStatus
from lorasmith.services.jobs import conclude
from lorasmith.services.workbench import Workbench


def run_job(workbench: Workbench, job: Job) -> Job:
    folder = workbench.path(job.folder)
    order = JobOrder.model_validate_json((folder / "job.json").read_text(encoding="utf-8"))
    result = run.run(order, folder, Reporter(folder))
    write_json(folder / "result.json", result.model_dump(mode="json"))
    job, lease = workbench.jobs.take(job.id, holder(), set(JobStatus) - ACTIVE)
    job = conclude(workbench, job, lease)
    workbench.jobs.release(lease)
    return job
