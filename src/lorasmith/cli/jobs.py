"""`lorasmith jobs`"""

from __future__ import annotations

from typing import Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import console_err, hint, print_json, print_table
from lorasmith.schemas.jobs import JobRequest, JobStatus

app = typer.Typer(help="Jobs that ran or run", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]


@app.command("list")
def list_jobs(context: typer.Context, as_json: AsJson = False) -> None:
    """List all jobs, newest last"""
    from lorasmith.services import jobs

    found = jobs.list_jobs(open_workbench(context))
    if as_json:
        print_json([job.model_dump(mode="json") for job in found])
        return
    print_table(
        ["job", "kind", "name", "status", "reason", "created"],
        [
            [job.id, job.kind, job.name, job.status, job.reason or "", f"{job.created_at:%Y-%m-%d %H:%M}"]
            for job in found
        ],
    )


@app.command("show")
def show_job(context: typer.Context, job: str) -> None:
    """Show one job with its spec and result, as JSON"""
    from lorasmith.services import jobs

    print_json(jobs.show_job(open_workbench(context), job).model_dump(mode="json"))


@app.command("logs")
def job_logs(context: typer.Context, job: str) -> None:
    """Print what the engine process wrote"""
    from lorasmith.services import jobs

    workbench = open_workbench(context)
    path = workbench.path(jobs.show_job(workbench, job).folder) / "log.txt"
    print(path.read_text(encoding="utf-8", errors="replace") if path.exists() else "", end="")


@app.command("metrics")
def job_metrics(context: typer.Context, job: str) -> None:
    """Print each logged step as a JSON line"""
    from lorasmith.services import jobs

    workbench = open_workbench(context)
    for event in jobs.job_events(workbench, jobs.show_job(workbench, job)):
        if event.type in ("step", "evaluation"):
            print(event.model_dump_json())


@app.command("pause")
def pause_job(context: typer.Context, job: str) -> None:
    """Save a job and stop it, to go on with `jobs resume`, `train --resume` or `data augment --resume`"""
    ask(context, job, JobRequest.PAUSE)


@app.command("cancel")
def cancel_job(context: typer.Context, job: str) -> None:
    """Stop a job for good; what it has made so far is saved first"""
    ask(context, job, JobRequest.CANCEL)


@app.command("checkpoint")
def checkpoint_job(context: typer.Context, job: str) -> None:
    """Save a running training job at its next step"""
    ask(context, job, JobRequest.CHECKPOINT)


def ask(context: typer.Context, name: str, request: JobRequest) -> None:
    from lorasmith.services import jobs

    workbench = open_workbench(context)
    job = jobs.ask(workbench, jobs.show_job(workbench, name), request)
    text = f"asked {job.id} to {request} at its next step" if job.request else f"{job.id} is {job.status}"
    console_err().print(text, markup=False)


@app.command("resume")
def resume_job(context: typer.Context, job: str) -> None:
    """Queue a stopped training or augmentation job again; a worker goes on from what is saved"""
    from lorasmith.services import jobs

    workbench = open_workbench(context)
    queued = jobs.queue_again(workbench, jobs.show_job(workbench, job))
    console_err().print(f"{queued.id} is queued", markup=False)
    hint(
        "lorasmith worker or lorasmith serve runs it; lorasmith train --resume or data augment --resume goes on in this terminal"
    )


@app.command("watch")
def watch_job(context: typer.Context, job: str) -> None:
    """Show a job as it runs, until it ends; Ctrl-C leaves it alone"""
    from lorasmith.cli.watching import JobView
    from lorasmith.services import jobs

    workbench = open_workbench(context)
    found = jobs.show_job(workbench, job)
    with JobView(found.name) as view:
        found = jobs.watch(workbench, found, view)
    console_err().print(f"{found.id} is {found.status}" + (f": {found.reason}" if found.reason else ""), markup=False)
    if found.status is JobStatus.FAILED:
        raise typer.Exit(1)


@app.command("checkpoints")
def job_checkpoints(context: typer.Context, job: str, as_json: AsJson = False) -> None:
    """List the checkpoints that a job holds"""
    from lorasmith.jobs.folder import checkpoint_folders
    from lorasmith.services import jobs

    workbench = open_workbench(context)
    folder = workbench.path(jobs.show_job(workbench, job).folder)
    found = checkpoint_folders(folder)
    if as_json:
        print_json([str(path) for path in found])
        return
    print_table(["checkpoint", "folder"], [[path.name, path] for path in found])
