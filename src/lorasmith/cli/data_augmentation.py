"""`lorasmith data augment` and `lorasmith data review`"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.data_options import AsJson
from lorasmith.cli.data_view import counts, show_fields, summary, visible
from lorasmith.cli.output import hint, print_json, print_table
from lorasmith.cli.watching import JobView
from lorasmith.errors import InvalidSpec

if TYPE_CHECKING:
    from lorasmith.schemas.augmentation import AugmentationSpec, ReviewItem
    from lorasmith.services.augmentation_review import Review

METHODS = "rephrase, expand, negative or back-translate"
CHOICES = "[y]es, [n]o, [e]dit, [s]kip or [q]uit"


def augment(
    context: typer.Context,
    data: Annotated[str | None, typer.Argument(metavar="NAME", help="Name or id of the dataset")] = None,
    method: Annotated[str | None, typer.Option("--method", help=METHODS)] = None,
    endpoint: Annotated[str | None, typer.Option("--endpoint", help="OpenAI-compatible API: https://host/v1")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Name of the model there")] = None,
    api_key_env: Annotated[str | None, typer.Option("--api-key-env", help="Environment variable with the key")] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", help="Texts per row  [default: 1]")] = None,
    language: Annotated[str | None, typer.Option("--language", help="Between translations, as fr")] = None,
    max_rows: Annotated[int | None, typer.Option("--max-rows", help="First rows of train to use")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the dataset to be")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", help="Requests at once  [default: 4]")] = None,
    requests_per_minute: Annotated[float | None, typer.Option("--requests-per-minute", help="At most so many")] = None,
    tokens_per_minute: Annotated[float | None, typer.Option("--tokens-per-minute", help="At most so many")] = None,
    budget_requests: Annotated[int | None, typer.Option("--budget-requests", help="Stop after so many")] = None,
    budget_tokens: Annotated[int | None, typer.Option("--budget-tokens", help="Stop after so many")] = None,
    allow_private: Annotated[
        bool, typer.Option("--allow-private", help="The endpoint may be in a private network, also over http")
    ] = False,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Another field, such as teacher.max_tokens=2048; repeatable")
    ] = None,
    resume: Annotated[str | None, typer.Option("--resume", metavar="JOB", help="Go on with a stopped job")] = None,
    as_json: AsJson = False,
) -> None:
    """Have a teacher write new texts for the rows of a dataset; Ctrl-C saves and stops"""
    from lorasmith.schemas.teachers import Reach
    from lorasmith.services import augmentation
    from lorasmith.services.augmentation_review import Review

    budgets = {"budget_requests": budget_requests, "budget_tokens": budget_tokens}
    teacher = {
        "endpoint": endpoint,
        "model": model,
        "api_key_env": api_key_env,
        "concurrency": concurrency,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
    }
    values = {"data": data, "method": method, "n": n, "language": language, "max_rows": max_rows, "name": name}
    workbench = open_workbench(context)
    if resume is not None:
        refuse_with_resume({**values, **teacher, "set": assignments, "allow_private": allow_private or None})
        with JobView("augment") as view:
            job = augmentation.resume_augmentation(workbench, resume, view, **budgets)
    else:
        spec = augmentation_spec(values, {**teacher, **budgets}, assignments or [])
        job = augmentation.start_augmentation(workbench, spec, Reach(loopback=True, private=allow_private))
        hint(f"job {job.id} · {workbench.path(job.folder)}")
        with JobView("augment") as view:
            job = augmentation.augment(workbench, job, view)
    review = Review(workbench, job)
    result = job.result or {}
    if as_json:
        print_json({"job": job.id, **result, "candidates": review.counts()})
    else:
        show_fields(
            {
                "job": job.id,
                "rows": counts({fate: number for fate, number in result["rows"].items() if number}),
                "candidates": counts(review.counts()) or "none",
                "sent": f"{result['requests']:,} requests, {result['repeated_requests']:,} of them repeated",
                "tokens": f"{result['prompt_tokens']:,} read, {result['completion_tokens']:,} written"
                + (f", estimated for {result['estimated_answers']:,} answers" if result["estimated_answers"] else ""),
            }
        )
    hint(f"next: lorasmith data review {job.id}")


def augmentation_spec(values: dict[str, Any], teacher: dict[str, Any], assignments: list[str]) -> AugmentationSpec:
    from lorasmith.schemas.augmentation import AugmentationMethod, AugmentationSpec
    from lorasmith.services.specs import merge, parse_assignments, parse_spec

    for name, value in (("NAME", values["data"]), ("--method", values["method"])):
        if value is None:
            raise InvalidSpec(
                f"{name} is missing", hint="lorasmith data augment NAME --method … --endpoint … --model …"
            )
    if values["method"] not in list(AugmentationMethod):
        raise InvalidSpec(f"--method must be {METHODS}, got {values['method']!r}")
    given = {key: value for key, value in values.items() if value is not None}
    of_teacher = {key: value for key, value in teacher.items() if value is not None}
    return parse_spec(AugmentationSpec, merge(given, {"teacher": of_teacher}, parse_assignments(assignments)))


def refuse_with_resume(given: dict[str, Any]) -> None:
    names = [key for key, value in given.items() if value is not None]
    if names:
        raise InvalidSpec(
            f"--resume goes on with what the job was asked to do, and {names[0]} would change it",
            hint="only --budget-requests and --budget-tokens can be given anew",
        )


def review(
    context: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB", help="Job of data augment, or its name")],
    accept: Annotated[list[str] | None, typer.Option("--accept", help="Candidates, as 17.1,17.2; repeatable")] = None,
    reject: Annotated[list[str] | None, typer.Option("--reject", help="The same, to be left out")] = None,
    accept_all: Annotated[bool, typer.Option("--accept-all", help="Accept everything that is pending")] = False,
    min_score: Annotated[
        float | None, typer.Option("--min-score", help="With --accept-all: from this novelty on, 0 to 1")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="List what is accepted and rejected too")] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Make a dataset of the source and what is accepted")] = False,
    name: Annotated[str | None, typer.Option("--name", help="With --apply: name of the new dataset")] = None,
    as_json: AsJson = False,
) -> None:
    """Look at what a teacher wrote, and decide what enters a dataset"""
    from lorasmith.services.augmentation_review import Review, apply_review
    from lorasmith.services.jobs import show_job

    if min_score is not None and not (accept_all and 0 <= min_score <= 1):
        raise InvalidSpec("--min-score goes with --accept-all and is a score from 0 to 1", hint="--min-score 0.3")
    if name is not None and not apply:
        raise InvalidSpec("--name goes with --apply", hint=f"lorasmith data review {job} --apply --name {name}")
    workbench = open_workbench(context)
    found = Review(workbench, show_job(workbench, job))
    found.decide(ids(reject), accepted=False)
    found.decide(ids(accept), accepted=True)
    if accept_all:
        found.accept_all(min_score or 0.0)
    if apply:
        dataset = apply_review(workbench, found, name or found.job.name)
        if as_json:
            print_json(dataset.model_dump(mode="json"))
        else:
            show_fields(summary(dataset))
        hint(f"next: lorasmith data leakage {dataset.name}")
        return
    decided = accept or reject or accept_all
    if not decided and not as_json and not everything and sys.stdin.isatty():
        ask_about(found)
        decided = True
    if as_json:
        items = found.items() if everything else found.pending()
        print_json(
            {
                "job": found.job.id,
                "counts": found.counts(),
                "items": [{"text": item.text, **item.model_dump(mode="json", exclude_none=True)} for item in items],
            }
        )
    elif decided:
        show_fields({"candidates": counts(found.counts()) or "none"})
    else:
        list_items(found, found.items() if everything else found.pending())
    hint(f"next: lorasmith data review {found.job.id} --apply --name NEW")


def ids(given: list[str] | None) -> list[str]:
    return [one.strip() for text in given or () for one in text.split(",") if one.strip()]


def list_items(review: Review, items: list[ReviewItem]) -> None:
    rows = [
        [
            item.candidate.id,
            item.state,
            f"{item.candidate.score:.2f}",
            visible(item.source),
            visible(item.text),
            item.candidate.reason or "",
        ]
        for item in items
    ]
    print_table(["candidate", "state", "score", "source", "text", "reason"], rows)
    typer.echo(f"candidates: {counts(review.counts()) or 'none'}", err=True)


def ask_about(review: Review) -> None:
    """One pending candidate after the other, until there are none or the reviewer leaves. Each decision is stored."""
    pending = review.pending()
    for number, item in enumerate(pending, start=1):
        candidate = item.candidate
        typer.echo(f"\n{candidate.id}, {number} of {len(pending)}, score {candidate.score:.2f}")
        shown = {"request": item.request, "source": item.source, "text": candidate.text}
        if item.request == item.source:
            del shown["request"]
        show_fields(shown)
        answer = choice()
        if answer == "q":
            return
        if answer == "e":
            text = edited(candidate.text)
            if text:
                review.decide([candidate.id], accepted=True, text=text)
            else:
                hint("not edited, so it stays pending")
        elif answer != "s":
            review.decide([candidate.id], accepted=answer == "y")


def edited(text: str) -> str:
    """The text as the reviewer's editor leaves it; empty where there is no editor, or where it ends with an error."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "candidate.txt"
        path.write_text(text, encoding="utf-8")
        try:
            ended = subprocess.run([*shlex.split(editor), str(path)], check=False)
        except OSError as error:
            hint(f"{editor}: {error.strerror}; set EDITOR to your editor")
            return ""
        return path.read_text(encoding="utf-8").strip() if ended.returncode == 0 else ""


def choice() -> str:
    while True:
        try:
            answer = str(typer.prompt(CHOICES, prompt_suffix=" ", err=True)).strip().lower()[:1]
        except typer.Abort:  # Ctrl-D
            return "q"
        if answer and answer in "ynesq":
            return answer
