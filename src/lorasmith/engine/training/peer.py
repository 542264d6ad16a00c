"""`python -m lorasmith.engine.training.peer FOLDER RANK COUNT`: a further process of a training job, or of its estimate."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from lorasmith.engine.optional_imports import hide_bitsandbytes
from lorasmith.engine.reporting import SilentReporter
from lorasmith.errors import LorasmithError
from lorasmith.files import read_json
from lorasmith.schemas.jobs import JobKind, JobOrder

STAGES = {
    JobKind.TRAINING: "lorasmith.engine.training.run",
    JobKind.ESTIMATE: "lorasmith.engine.training.estimation.run",
}


def main(folder: Path, rank: int, count: int) -> None:
    order = JobOrder.model_validate(read_json(folder / "job.json"))
    stage = importlib.import_module(STAGES[order.kind])
    from lorasmith.engine.training.devices import join  # last, as the first process goes on when all have joined

    devices = join(folder, rank, count)
    try:
        stage.run_on(order, folder, SilentReporter(folder), devices)
    except LorasmithError as error:
        sys.exit(f"process {rank + 1} of {count}: {error.message}")


if __name__ == "__main__":
    hide_bitsandbytes()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
