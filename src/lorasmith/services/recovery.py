"""The index made again: from what can be read of the database, from its newest whole backup, and from the folders on disk.

What stands earlier in this list wins. Nothing is removed: the database that was there is kept beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from lorasmith.errors import Conflict, LorasmithError
from lorasmith.files import folder_size_bytes, read_json, scratch_folder
from lorasmith.jobs.folder import EVENTS, ORDER, read_error, read_result
from lorasmith.jobs.processes import engine_runs
from lorasmith.schemas.adapters import Adapter
from lorasmith.schemas.data import Dataset
from lorasmith.schemas.evaluation import Evaluation
from lorasmith.schemas.jobs import ACTIVE, Job, JobOrder, JobStatus, first_event
from lorasmith.schemas.models import BaseModelEntry
from lorasmith.services.data_versions import DESCRIPTION
from lorasmith.services.job_outcomes import adapter_digest
from lorasmith.services.jobs import verdict
from lorasmith.services.server_lock import only_server
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from lorasmith.store.database_file import DATABASE_NAME, backups, keep_aside, problems, put_in_place, readable_rows

Row = Any  # of one of NOUNS
NOUNS: dict[str, type[BaseModel]] = {
    "datasets": Dataset,
    "adapters": Adapter,
    "evaluations": Evaluation,
    "jobs": Job,
    "models": BaseModelEntry,
}
LOST = "the database was made again; the engine was not running"


class Recovery(BaseModel):
    """What `lorasmith recover` found and made; counts are rows by table."""

    problems: list[str] = Field(description="Of the database that was there; empty where it was whole.")
    kept_aside: str | None = Field(description="Folder of the damaged database, or null where it was whole and stays.")
    backup: str | None = Field(description="The backup that was used.")
    from_database: dict[str, int] = Field(default_factory=dict)
    from_backup: dict[str, int] = Field(default_factory=dict)
    from_folders: dict[str, int] = Field(default_factory=dict)
    left_out: list[str] = Field(
        default_factory=list, description="Rows without their folder, folders that do not say what they are."
    )


def recover(settings: Settings) -> Recovery:
    """Make rows for all that is on disk and has none; a damaged database is first replaced by a new one.

    Raises `Conflict` while a server or an engine works on the home folder.
    """
    home, database = settings.home, settings.home / DATABASE_NAME
    with only_server(home):
        refuse_running(home)
        found = problems(database) if database.exists() else [f"{database} is gone"]
        whole = not found and not unreadable_documents(home)
        recovery = Recovery(problems=found, kept_aside=None, backup=None)
        if whole:
            rebuild(Workbench.open(settings), recovery)
        else:
            make_anew(home, recovery)
    return recovery


def make_anew(home: Path, recovery: Recovery) -> None:
    """The new database is made beside the damaged one and takes its place when all of it is there: a crash loses nothing."""
    database = home / DATABASE_NAME
    rows: dict[str, Row] = {}
    with scratch_folder(home) as scratch:
        (scratch / "read").mkdir()
        take(recovery, recovery.from_database, documents(database, scratch / "read"), rows, home)
        for backup in backups(home):
            if not problems(backup):
                recovery.backup = str(backup)
                take(recovery, recovery.from_backup, documents(backup, scratch / "read"), rows, home)
                break
        made = Workbench.open(Settings(home=scratch / "made"))
        workbench = replace(made, home=home)
        for table, row in rows.values():
            store(workbench, table, row)
        rebuild(workbench, recovery)
        made.models.engine.dispose()
        recovery.kept_aside = str(keep_aside(database))
        put_in_place(scratch / "made" / DATABASE_NAME, database)


def refuse_running(home: Path) -> None:
    for folder in home.glob("jobs/*"):
        if engine_runs(folder):
            raise Conflict(f"an engine runs in {folder}", hint="wait for its end, or end the process")


def unreadable_documents(home: Path) -> list[str]:
    """Rows that are no longer what they were, though SQLite finds nothing wrong with their pages."""
    with scratch_folder(home) as scratch:
        return [table for table, _, row in documents(home / DATABASE_NAME, scratch) if row is None]


def documents(database: Path, scratch: Path) -> Iterator[tuple[str, str, Row]]:
    """(table, document, row) of what can be read of a database; None for a document that is none."""
    for table, document in readable_rows(database, tuple(NOUNS), scratch):
        row = None
        with suppress(ValidationError):
            row = NOUNS[table].model_validate_json(document)
        yield table, document, row


def take(
    recovery: Recovery, counts: dict[str, int], found: Iterator[tuple[str, str, Row]], rows: dict[str, Row], home: Path
) -> None:
    """Add what is not there yet and has its folder."""
    for table, _, row in found:
        if row is None or row.id in rows:
            continue
        folder = getattr(row, "folder", None)
        if folder is not None and not (home / folder).is_dir():
            recovery.left_out.append(f"{table} {row.name}: {folder} is gone")
            continue
        rows[row.id] = (table, row)
        counts[table] = counts.get(table, 0) + 1


def store(workbench: Workbench, table: str, row: Row) -> None:
    """Insert a row under its name, or, where another has it, one that says which it is."""
    if isinstance(row, Job) and row.status in ACTIVE:
        row.status, row.reason_code, row.reason = JobStatus.INTERRUPTED, "crashed", LOST
        row.pid = row.process_started = None
    into = getattr(workbench, table)
    if into.unique_names and row.name in into.names():
        free = row.reference if isinstance(row, Dataset) else f"{row.name}-{row.id[-6:].lower()}"
        row = row.model_copy(update={"name": free if free not in into.names() else row.id})
    into.add(row)


def rebuild(workbench: Workbench, recovery: Recovery) -> None:
    """Rows for the folders that have none; newer datasets first, which keep the plain name of their versions."""
    makers: dict[str, Callable[[Workbench, Path], Row]] = {
        "jobs": job_of,
        "datasets": dataset_of,
        "adapters": adapter_of,
        "evaluations": evaluation_of,
    }
    for table, make in makers.items():
        known = {row.id for row in getattr(workbench, table).list()}
        made = []
        for folder in workbench.home.glob(f"{table}/*"):
            if not folder.is_dir() or folder.name.startswith(".") or folder.name in known:
                continue
            try:
                made.append(make(workbench, folder))
            except (
                LorasmithError,
                ValidationError,
                LookupError,
                TypeError,
                AttributeError,
                ValueError,
                OSError,
            ) as error:
                recovery.left_out.append(f"{folder}: {str(error).splitlines()[0]}")
        for row in sorted(made, key=lambda row: row.created_at, reverse=True):
            store(workbench, table, row)
        if made:
            recovery.from_folders[table] = len(made)


def dataset_of(workbench: Workbench, folder: Path) -> Dataset:
    return Dataset.model_validate(read_json(folder / DESCRIPTION)).model_copy(
        update={"folder": relative(workbench, folder)}
    )


def evaluation_of(workbench: Workbench, folder: Path) -> Evaluation:
    described = Evaluation.model_validate(read_json(folder / "evaluation.json"))
    return described.model_copy(update={"id": folder.name, "folder": relative(workbench, folder)})


def job_of(workbench: Workbench, folder: Path) -> Job:
    """As the folder tells it; one that had not ended is interrupted, and started again by `jobs resume` alone."""
    order = JobOrder.model_validate(read_json(folder / ORDER))
    events = folder / EVENTS
    lines = events.read_bytes().splitlines() if events.is_file() else []
    times = [event.time for event in (first_event(lines), first_event(reversed(lines))) if event is not None]
    result, error = read_result(folder), read_error(folder)
    job = Job(
        id=order.id,
        kind=order.kind,
        name=order.inputs.get("adapter_name") or str(order.kind),
        spec=order.spec,
        folder=relative(workbench, folder),
        base_model=order.inputs.get("model_name"),
        dataset_id=order.inputs.get("dataset_id"),
        auto_resume=False,
        created_at=written_at(folder / ORDER),
        started_at=times[0] if times else None,
        completed_at=times[-1] if times else None,
        result=result,
    )
    job.status, job.reason_code, job.reason = verdict(job, result, error, LOST)
    adapter = f"adapter_{job.id.removeprefix('job_')}"
    job.adapter_id = adapter if (workbench.home / "adapters" / adapter).is_dir() else None
    return job


def adapter_of(workbench: Workbench, folder: Path) -> Adapter:
    """From its passport, and the order of the job that made it, where that is still there."""
    passport = read_json(folder / "passport.json")
    order = workbench.home / "jobs" / str(passport["job"]) / ORDER
    inputs = read_json(order)["inputs"] if order.is_file() else {}
    spec = read_json(folder / "training_config.json")
    dataset = passport["dataset"]
    return Adapter(
        id=folder.name,
        name=inputs.get("adapter_name") or spec.get("name") or folder.name,
        base_model=passport["base_model"],
        base_folder=inputs.get("model_folder") or passport["base_model"],
        training_job_id=passport["job"],
        dataset=dataset["name"],
        dataset_id=dataset["id"],
        dataset_sha256=dataset["sha256"],
        folder=relative(workbench, folder),
        digest=adapter_digest(folder),
        size_bytes=folder_size_bytes(folder),
        lora_config=spec["lora"],
        metrics={"validation_loss": passport["metrics"]["validation_loss"]},
        created_at=written_at(folder / "passport.json"),
    )


def relative(workbench: Workbench, folder: Path) -> str:
    return folder.relative_to(workbench.home).as_posix()


def written_at(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)
