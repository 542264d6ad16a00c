"""`python -m lorasmith.engine.training.peer FOLDER RANK COUNT`: a further process of a training job."""

from __future__ import annotations

import sys
from pathlib import Path

from lorasmith.engine.reporting import SilentReporter
from lorasmith.engine.training.devices import join
from lorasmith.engine.training.run import run_on
from lorasmith.errors import LorasmithError
from lorasmith.files import read_json
from lorasmith.schemas.jobs import JobOrder


def main(folder: Path, rank: int, count: int) -> None:
    devices = join(folder, rank, count)
    try:
        run_on(JobOrder.model_validate(read_json(folder / "job.json")), folder, SilentReporter(folder), devices)
    except LorasmithError as error:
        sys.exit(f"process {rank + 1} of {count}: {error.message}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
