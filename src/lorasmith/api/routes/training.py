"""Jobs: queue, list, follow, stop, go on, copy."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from lorasmith.api import jobs as views
from lorasmith.api import streams
from lorasmith.api.contents import EVENT_STREAM, PAGE_OR_STREAM, STREAM
from lorasmith.api.deps import CurrentWorkbench
from lorasmith.api.event_streams import Chunks, EventStream
from lorasmith.api.feeds import Feeds
from lorasmith.api.idempotency import IdempotentRoute
from lorasmith.api.paging import Cursor, Limit, page_of
from lorasmith.jobs.events import events_after
from lorasmith.jobs.folder import EVENTS, LOG
from lorasmith.jobs.log import lines_after
from lorasmith.schemas.api import Page
from lorasmith.schemas.api_jobs import (
    CheckpointResource,
    JobClone,
    JobCreate,
    JobResource,
    LogPage,
    MetricPage,
    MetricPoint,
)
from lorasmith.schemas.jobs import Job, JobKind, JobRequest, JobStatus
from lorasmith.services.jobs import ask, queue_again
from lorasmith.services.names import check_dataset_name, check_model_name
from lorasmith.services.training import build_spec, clone_training, start_training

PREFIX = "/api/v1/finetune"
router = APIRouter(prefix=PREFIX, tags=["jobs"], route_class=IdempotentRoute)

JobId = Annotated[str, Path(description="Id of a job.", pattern=r"^job_[0-9A-Z]{26}$")]
After = Annotated[int, Query(alias="cursor", ge=0, lt=2**53, description="`next_cursor` of the page before.")]
LastEventId = Annotated[str | None, Header(description="Of a stream: the last id that was received.")]
POINTS = {"step", "evaluation"}


def required(workbench: CurrentWorkbench, job_id: str) -> Job:
    return workbench.jobs.require(job_id)


@router.post("/jobs", status_code=202)
def create_job(workbench: CurrentWorkbench, asked: JobCreate, response: Response) -> JobResource:
    """Queue a training run"""
    check_model_name(workbench, asked.base_model)
    check_dataset_name(workbench, asked.dataset_id)
    flags = {**asked.fields(), "name": asked.name}
    spec = build_spec(flags, home=workbench.home)
    facts: dict[str, Any] = {"description": asked.description, "priority": asked.priority, "cores": asked.cores}
    return accepted(workbench, start_training(workbench, spec, **facts), response)


@router.get("/jobs")
def list_jobs(
    workbench: CurrentWorkbench,
    limit: Limit = 50,
    cursor: Cursor = None,
    status: Annotated[list[JobStatus] | None, Query(description="One or more.")] = None,
    kind: JobKind | None = None,
) -> Page[JobResource]:
    """List jobs, the newest first"""
    statuses = set(status) if status else None
    found = workbench.jobs.newest(limit=limit + 1, after=cursor, statuses=statuses, kind=kind)
    page = page_of(found, limit, lambda job: job.id)
    return Page(data=[views.resource(workbench, job) for job in page.data], next_cursor=page.next_cursor)


@router.get("/jobs/{job_id}")
def get_job(workbench: CurrentWorkbench, job_id: JobId) -> JobResource:
    """Show a job"""
    return views.resource(workbench, required(workbench, job_id))


@router.delete("/jobs/{job_id}", status_code=202)
def cancel_job(workbench: CurrentWorkbench, job_id: JobId, response: Response) -> JobResource:
    """Stop a job for good; a training run saves a checkpoint first"""
    return accepted(workbench, ask(workbench, required(workbench, job_id), JobRequest.CANCEL), response)


@router.post("/jobs/{job_id}/pause", status_code=202)
def pause_job(workbench: CurrentWorkbench, job_id: JobId, response: Response) -> JobResource:
    """Save a training run and stop it"""
    return accepted(workbench, ask(workbench, required(workbench, job_id), JobRequest.PAUSE), response)


@router.post("/jobs/{job_id}/checkpoint", status_code=202)
def checkpoint_job(workbench: CurrentWorkbench, job_id: JobId, response: Response) -> JobResource:
    """Save a training run at its next step"""
    return accepted(workbench, ask(workbench, required(workbench, job_id), JobRequest.CHECKPOINT), response)


@router.post("/jobs/{job_id}/resume", status_code=202)
def resume_job(workbench: CurrentWorkbench, job_id: JobId, response: Response) -> JobResource:
    """Queue a stopped training run again, from its last checkpoint"""
    return accepted(workbench, queue_again(workbench, required(workbench, job_id)), response)


@router.post("/jobs/{job_id}/clone", status_code=202)
def clone_job(workbench: CurrentWorkbench, job_id: JobId, asked: JobClone, response: Response) -> JobResource:
    """Queue a copy of a training run, with some fields changed"""
    lora = asked.lora_config.model_dump(exclude_unset=True, exclude={"bias"}) if asked.lora_config else {}
    training = asked.training_config.settings() if asked.training_config else {}
    changes = {"lora": lora, "training": training, "name": asked.name}
    facts: dict[str, Any] = {"description": asked.description, "priority": asked.priority, "cores": asked.cores}
    copy = clone_training(workbench, required(workbench, job_id), changes, **facts)
    return accepted(workbench, copy, response)


def accepted(workbench: CurrentWorkbench, job: Job, response: Response) -> JobResource:
    response.headers["Location"] = f"{PREFIX}/jobs/{job.id}"
    return views.resource(workbench, job)


@router.get("/jobs/{job_id}/checkpoints")
def list_checkpoints(workbench: CurrentWorkbench, job_id: JobId) -> list[CheckpointResource]:
    """List the checkpoints that a job holds, the oldest first"""
    return views.checkpoints(workbench, required(workbench, job_id))


@router.get("/jobs/{job_id}/metrics", response_model=MetricPage, responses=PAGE_OR_STREAM)
async def job_metrics(
    request: Request,
    workbench: CurrentWorkbench,
    job_id: JobId,
    limit: Annotated[int, Query(ge=1, le=5000)] = 1000,
    after: After = 0,
    last_event_id: LastEventId = None,
) -> Any:
    """Steps and evaluations, oldest first: a page, or with `Accept: text/event-stream` as they happen"""
    job = await run_in_threadpool(required, workbench, job_id)
    if wants_stream(request):
        number = streams.last_number(last_event_id) if last_event_id else after
        return stream(request, streams.job_events(feeds(request), job, number, POINTS))
    return await run_in_threadpool(metric_page, workbench, job, after, limit)


def metric_page(workbench: CurrentWorkbench, job: Job, after: int, limit: int) -> MetricPage:
    path = workbench.path(job.folder) / EVENTS
    found: list[MetricPoint] = []
    while len(found) <= limit and (events := events_after(path, after, limit)):
        after = events[-1].seq
        points = (event for event in events if event.type in POINTS)
        found += [MetricPoint.model_validate(event.model_dump()) for event in points]
    shown = found[:limit]
    return MetricPage(data=shown, next_cursor=shown[-1].seq if len(found) > limit else None)


@router.get("/jobs/{job_id}/logs", response_model=LogPage, responses=PAGE_OR_STREAM)
async def job_logs(
    request: Request,
    workbench: CurrentWorkbench,
    job_id: JobId,
    limit: Annotated[int, Query(ge=1, le=5000)] = 1000,
    after: After = 0,
    last_event_id: LastEventId = None,
) -> Any:
    """What the engine process wrote: a page, or with `Accept: text/event-stream` as it is written"""
    job = await run_in_threadpool(required, workbench, job_id)
    if wants_stream(request):
        number = streams.last_number(last_event_id) if last_event_id else after
        return stream(request, streams.log_lines(feeds(request), job, number))
    lines = await run_in_threadpool(lines_after, workbench.path(job.folder) / LOG, after, limit + 1)
    shown = [{"offset": offset, "text": text} for offset, text in lines[:limit]]
    return {"data": shown, "next_cursor": shown[-1]["offset"] if len(lines) > limit else None}


@router.get("/jobs/{job_id}/events", response_class=EventStream, responses=STREAM)
async def follow_job(
    request: Request, workbench: CurrentWorkbench, job_id: JobId, last_event_id: LastEventId = None
) -> EventStream:
    """Stream everything that a job says, from its beginning or from `Last-Event-ID` on, until it stops"""
    job = await run_in_threadpool(required, workbench, job_id)
    number = streams.last_number(last_event_id) if last_event_id else 0
    return stream(request, streams.job_events(feeds(request), job, number, None))


@router.get("/events", response_class=EventStream, responses=STREAM)
async def follow_all(request: Request, last_event_id: LastEventId = None) -> EventStream:
    """Stream what all jobs that wait or run say, from now on or from `Last-Event-ID` on"""
    cursor = streams.parse_cursor(last_event_id or "")
    return stream(request, streams.all_events(feeds(request), cursor))


def wants_stream(request: Request) -> bool:
    return EVENT_STREAM in request.headers.get("accept", "")


def feeds(request: Request) -> Feeds:
    found: Feeds = request.app.state.feeds
    return found


def stream(request: Request, chunks: Chunks) -> EventStream:
    """It ends with the caller's token or session."""
    state = request.app.state
    return EventStream(chunks, state.streams, lambda: state.credentials.caller(request) is not None)
