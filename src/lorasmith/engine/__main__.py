"""`python -m lorasmith.engine FOLDER`: run the job that a folder describes, without database or server."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO

from pydantic import BaseModel, ValidationError

from lorasmith.engine.optional_imports import hide_bitsandbytes
from lorasmith.engine.out_of_memory import ran_out_of_memory
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import Conflict, DiskFull, Interrupted, InvalidSpec, Killed, LorasmithError
from lorasmith.faults import fault_point
from lorasmith.files import disk_errors, read_json, try_lock, write_json
from lorasmith.schemas.jobs import JobError, JobKind, JobOrder

STAGES = {
    JobKind.TRAINING: "lorasmith.engine.training.run",
    JobKind.EVALUATION: "lorasmith.engine.evaluation.run",
    JobKind.EXPORT: "lorasmith.engine.adapters.export",
    JobKind.GENERATION: "lorasmith.engine.serving.run",
    JobKind.LABELS: "lorasmith.engine.data.labels",
    JobKind.ESTIMATE: "lorasmith.engine.training.estimation.run",
    JobKind.AUGMENTATION: "lorasmith.engine.augmentation.run",
    JobKind.STATISTICS: "lorasmith.engine.data.statistics",
    JobKind.LEDGER: "lorasmith.engine.data.ledger",
}


# oneDNN keeps a compiled kernel for each matrix shape, and the layer between it and torch what it prepares for one; rows of
# many lengths would fill the 1,024 places of each, at a gigabyte. Of 32 kernels a layer reuses none: 1.6 times the time.
FEWER_KERNELS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "8"}
RESERVE, RESERVE_BYTES = "reserve", 256 * 1024  # what a full disk leaves for `error.json` and the last events


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m lorasmith.engine JOB_FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).resolve()
    lock = own_lock(folder)
    if lock is None:
        print(f"another engine process runs in {folder}", file=sys.stderr)
        return Conflict.exit_code
    fault_point("engine.begun")
    (folder / "error.json").unlink(missing_ok=True)
    reserve = folder / RESERVE
    with suppress(OSError):  # a disk that is full already has no room for it either
        reserve.write_bytes(bytes(RESERVE_BYTES))
    report = Reporter(folder)
    report.obey_signals()
    try:
        with disk_errors(folder):  # also for what a library raises while `DiskFull` passes through it
            report("started", pid=os.getpid())
            result = run_job(folder, report)
        fault_point("engine.ran")
    except Killed as error:  # one of the job's processes was, and whoever waits for this one is to see it
        reserve.unlink(missing_ok=True)
        with suppress(OSError):  # the log lies on a disk that may be full
            print(error.message, file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        raise
    except BaseException as error:
        failure = explain(error)
        if not isinstance(error, LorasmithError):
            with suppress(OSError):
                traceback.print_exc()
        status = error.code if isinstance(error, Interrupted) else "failed"
        try:
            with disk_errors(folder):
                reserve.unlink(missing_ok=True)
            write_json(folder / "error.json", failure.model_dump())
            report("ended", status=status, **failure.model_dump())
        except (LorasmithError, OSError):  # of a folder that takes nothing any more; its log is open already
            with suppress(OSError):
                print(failure.message, file=sys.stderr, flush=True)
        return failure.exit_code
    reserve.unlink(missing_ok=True)
    write_json(folder / "result.json", result.model_dump(mode="json"))
    fault_point("engine.result")
    report("ended", status="completed")
    return 0


def own_lock(folder: Path) -> IO[str] | None:
    """The folder's lock, held until the process ends; None when another engine has it.

    Who starts an engine may have taken it already, and handed it on with its number in `LORASMITH_ENGINE_LOCK`.
    """
    inherited = os.environ.pop("LORASMITH_ENGINE_LOCK", None)
    if inherited is not None:
        os.set_inheritable(int(inherited), False)
        return os.fdopen(int(inherited), "w")
    lock = (folder / "engine.lock").open("w")
    return lock if try_lock(lock.fileno()) else None


def run_job(folder: Path, report: Reporter) -> BaseModel:
    order = JobOrder.model_validate(read_json(folder / "job.json"))
    try:
        stage = importlib.import_module(STAGES[order.kind])
        result: BaseModel = stage.run(order, folder, report)
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        raise InvalidSpec(f"job.json does not fit: {'; '.join(problems)}") from error
    return result


def explain(error: BaseException) -> JobError:
    """A reason code, a sentence and a way out, for whatever was raised."""
    if isinstance(error, LorasmithError):
        told = JobError(reason_code=error.code, message=error.message, hint=error.hint, exit_code=error.exit_code)
        told.needed_bytes = error.needed_bytes if isinstance(error, DiskFull) else None
        return told
    if ran_out_of_memory(error):
        hint = "a smaller model or shorter rows, or more memory; a training job goes on with lorasmith train --resume"
        return JobError(reason_code="oom", message="the machine ran out of memory", hint=hint)
    if isinstance(error, ModuleNotFoundError):
        hint = "pip install 'lorasmith[train]'"
        return JobError(reason_code="missing_extra", message=f"{error.name} is not installed", hint=hint)
    return JobError(reason_code="crashed", message=f"{type(error).__name__}: {error}", hint="log.txt has the traceback")


if __name__ == "__main__":
    hide_bitsandbytes()
    os.environ.update({**FEWER_KERNELS, **os.environ})  # read at the first product
    sys.exit(main(sys.argv[1:]))
