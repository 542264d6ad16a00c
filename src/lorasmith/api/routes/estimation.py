"""Estimates: what a run would take."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from lorasmith.api.deps import CurrentWorkbench
from lorasmith.api.idempotency import IdempotentRoute
from lorasmith.api.problems import without_paths
from lorasmith.api.waiting import Prefer, wait_until
from lorasmith.errors import NotFound
from lorasmith.schemas.api_training import EstimateRequest, EstimateResource
from lorasmith.schemas.estimation import Estimate
from lorasmith.schemas.jobs import ENDED, Job, JobKind
from lorasmith.services.estimation import queue_estimate
from lorasmith.services.jobs import show_job
from lorasmith.services.names import check_dataset_name, check_model_name
from lorasmith.services.training import build_spec
from lorasmith.services.workbench import Workbench

router = APIRouter(prefix="/api/v1/finetune/estimate", tags=["estimate"], route_class=IdempotentRoute)


def estimate_resource(workbench: Workbench, job: Job) -> EstimateResource:
    return EstimateResource(
        id=job.id,
        status=job.status,
        estimate=None if job.result is None else Estimate.model_validate(job.result),
        created_at=job.created_at,
        completed_at=job.completed_at,
        error=None if job.reason is None else without_paths(job.reason, workbench.home),
    )


def queue(workbench: Workbench, asked: EstimateRequest) -> Job:
    check_model_name(workbench, asked.base_model)
    check_dataset_name(workbench, asked.dataset_id)
    spec = build_spec(asked.fields(), home=workbench.home)
    return queue_estimate(workbench, spec, measuring_s=asked.measuring_s)


@router.post(
    "", status_code=202, responses={200: {"model": EstimateResource, "description": "It ended within the wait"}}
)
async def create_estimate(
    workbench: CurrentWorkbench, asked: EstimateRequest, request: Request, response: Response, prefer: Prefer = None
) -> EstimateResource:
    """Predict memory, time and disk of a run"""
    job = await run_in_threadpool(queue, workbench, asked)
    response.headers["Location"] = f"/api/v1/finetune/estimate/{job.id}"
    done = await wait_until(lambda: show_job(workbench, job.id).status in ENDED, prefer, request, response)
    response.status_code = 200 if done else 202
    return estimate_resource(workbench, await run_in_threadpool(show_job, workbench, job.id))


@router.get("/{estimate_id}")
def get_estimate(
    workbench: CurrentWorkbench, estimate_id: Annotated[str, Path(pattern=r"^job_[0-9A-Z]{26}$")]
) -> EstimateResource:
    """Show an estimate"""
    job = show_job(workbench, estimate_id)
    if job.kind is not JobKind.ESTIMATE:
        raise NotFound(f"the job {estimate_id} is no estimate but of kind {job.kind}")
    return estimate_resource(workbench, job)
