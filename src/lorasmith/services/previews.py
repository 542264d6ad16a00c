"""Engine processes that answer a question and leave nothing: their folders go when they end."""

from __future__ import annotations

import shutil
from pathlib import Path

from lorasmith.errors import Interrupted, JobFailed
from lorasmith.jobs.folder import EventReader, write_order
from lorasmith.jobs.processes import start_engine
from lorasmith.jobs.runner import follow
from lorasmith.schemas.jobs import JobOrder
from lorasmith.services.jobs import Watch
from lorasmith.services.workbench import Workbench


def preview_folder(workbench: Workbench, job_id: str) -> Path:
    return workbench.path(f"previews/{job_id}")


def run_preview(folder: Path, order: JobOrder, watch: Watch) -> dict[str, object]:
    """`result.json` of the order, run in that folder, which may hold its inputs. A crash leaves the folder: it has the log."""
    write_order(folder, order)
    try:
        result = follow(folder, start_engine(folder), EventReader(folder), watch)
    except JobFailed as error:
        if error.code not in ("crashed", "oom"):
            shutil.rmtree(folder)
        raise
    except (Interrupted, KeyboardInterrupt):
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    return result
