"""A bicycle shop whose rows a teacher rewords, in jobs whose engine runs in the process of the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorasmith.engine.augmentation import run
from lorasmith.engine.reporting import Reporter
from lorasmith.files import write_json
from lorasmith.jobs.leases import holder
from lorasmith.schemas.jobs import ACTIVE, Job, JobOrder, JobStatus
from lorasmith.schemas.teachers import Reach
from lorasmith.services.jobs import conclude
from lorasmith.services.workbench import Workbench
from tests.teacher_stub import material_of

LOCAL = Reach(loopback=True)
SYSTEM = "You answer for a bicycle shop in a friendly way."
QUESTIONS = {
    "train": [
        "How often should I oil the chain of my bicycle in winter?",
        "Is the workshop open on Saturday afternoon?",
        "Can I return a helmet that I have worn only once?",
    ],
    "val": ["Which inner tube fits a tyre of the size 700x32?"],
    "test": ["Do you send whole bicycles to customers in Norway?"],
}

GREETINGS = ["Grüß Gott!", "Good evening to all of you.", "Hi", "It's me again.", "One more thing:"]

Augment = Callable[..., Job]


def run_job(workbench: Workbench, job: Job) -> Job:
    folder = workbench.path(job.folder)
    order = JobOrder.model_validate_json((folder / "job.json").read_text(encoding="utf-8"))
    result = run.run(order, folder, Reporter(folder))
    write_json(folder / "result.json", result.model_dump(mode="json"))
    job, lease = workbench.jobs.take(job.id, holder(), set(JobStatus) - ACTIVE)
    job = conclude(workbench, job, lease)
    workbench.jobs.release(lease)
    return job


def question_of(request: dict[str, Any]) -> str:
    material = material_of(request)
    return str(material["request"] if "request" in material else material["conversation"][-1]["content"])
