"""`lorasmith train`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import console_out, duration, hint, print_json, size
from lorasmith.cli.watching import JobView
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.jobs import Job


def train(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="starter, a folder, a hub id or a registered name")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Name of a dataset, or a file to import")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the new adapter")] = None,
    preset: Annotated[
        str | None, typer.Option(help="quick, balanced, high_quality, cpu, gpu-8gb, domain, tiny, or one of your own")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Chat template for a model without one: chatml or plain")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with the fields of a run")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field, for example lora.rank=16; repeatable")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the run with every default filled in, and stop")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Queue the run for a worker, and return")] = False,
    priority: Annotated[int, typer.Option(help="Of a queued run: higher ones go first")] = 0,
    cores: Annotated[int | None, typer.Option(min=1, help="CPU cores that the run may use; without it, all")] = None,
    resume: Annotated[str | None, typer.Option(metavar="JOB", help="Go on with a stopped job")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the adapter as JSON")] = False,
) -> None:
    """Train an adapter; Ctrl-C saves and stops"""
    from lorasmith.services import training

    workbench = open_workbench(context)
    flags = {"model": model, "data": data, "name": name, "preset": preset, "template": template}
    if resume:
        refuse_changes(
            {**flags, "config": config, "set": assignments, "dry-run": dry_run, "cores": cores, "priority": priority}
        )
    if resume and detach:
        from lorasmith.services import jobs

        print_queued(jobs.queue_again(workbench, jobs.show_job(workbench, resume)), as_json=as_json)
        return
    if resume:
        with JobView("train") as view:
            adapter = training.resume_training(workbench, resume, view)
    else:
        spec = training.build_spec(flags, config=config, assignments=assignments, home=workbench.home)
        if dry_run:
            import yaml

            print(yaml.safe_dump(spec.model_dump(), sort_keys=False), end="")
            return
        job = training.start_training(workbench, spec, auto_resume=detach, priority=priority, cores=cores)
        if detach:
            print_queued(job, as_json=as_json)
            return
        hint(f"job {job.id} · {workbench.path(job.folder)}")
        with JobView("train") as view:
            adapter = training.train(workbench, job, view)
    if as_json:
        print_json(adapter.model_dump(mode="json"))
        return
    seconds = adapter.metrics["training_time_seconds"]
    loss = adapter.metrics["validation_loss"]
    validation = f", validation loss {loss:.3f}" if loss is not None else ""
    console_out().print(
        f"adapter {adapter.name}: trained in {duration(seconds)}{validation}, {size(adapter.size_bytes)}", markup=False
    )
    console_out().print(f"  {workbench.path(adapter.folder)}", markup=False)
    hint(f"next: lorasmith eval {adapter.name} --data {adapter.dataset}")


def refuse_changes(options: dict[str, Any]) -> None:
    """A job goes on as it began: options beside `--resume` would have no effect."""
    given = ", ".join(f"--{option}" for option, value in options.items() if value)
    if given:
        raise InvalidSpec(
            f"--resume goes on with a job as it began, and takes no {given}",
            hint="lorasmith train without --resume begins another run",
        )


def print_queued(job: Job, *, as_json: bool) -> None:
    if as_json:
        print_json(job.model_dump(mode="json"))
        return
    console_out().print(f"queued {job.id} as {job.name}", markup=False)
    hint(f"lorasmith worker or lorasmith serve runs it; follow it with: lorasmith jobs watch {job.id}")
