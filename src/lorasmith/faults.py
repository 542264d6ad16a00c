"""Named places at which a test ends this process or makes the disk fail, to see what is left. Without an order they do nothing.

`LORASMITH_FAULT=checkpoint.sealed:1:kill` acts at the first time that the named step is reached; several are separated by
commas. `kill` is SIGKILL to this process, `enospc` and `eio` raise the `OSError` of a full and of a broken disk.
`LORASMITH_FAULT_COUNTS` names a file to which each process adds a line `name pid` per hit. With it the hits of all
processes are counted together, so that an engine that is started again does not meet the same fault again.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["kill", "enospc", "eio"]
FAULT_VARIABLE, COUNTS_VARIABLE = "LORASMITH_FAULT", "LORASMITH_FAULT_COUNTS"

FOLDERS = {
    "dataset": "a dataset, beside the others",
    "checkpoint": "a checkpoint of a run",
    "best": "the best weights of a run",
    "adapter": "the adapter in the folder of its job",
    "kept-adapter": "its copy in the store",
    "export": "an export",
}
FOLDER_STEPS = {
    "begun": "its empty `.staging-…` folder is there",
    "filled": "its files are written, not yet flushed",
    "sealed": "its files are flushed and `manifest.json` is written",
    "renamed": "it has its name, and the folder above is not flushed",
}
STEPS = {
    "import.opened": "the source has been hashed, its working folder is open",
    "import.read": "every row is in the working folder, nothing of it committed",
    "import.flushed": "rows and ledger are flushed, where the reading stands is not",
    "import.committed": "where the reading stands is committed",
    "import.decided": "the parts are in the staging folder",
    "import.described": "their digest and description too",
    "import.stored": "the dataset has its row, the working folder is still there",
    "job.ordered": "`job.json` is written, the job has no row",
    "job.added": "the job has its row",
    "job.claiming": "a claim is written, not committed",
    "job.claimed": "a claim is committed, no engine is started",
    "job.started": "the engine runs, its number is not in the row",
    "job.begun": "its number is in the row",
    "job.asked": "a request is in the row, not in `control.json`",
    "job.requested": "`control.json` is written",
    "job.phase": "the row follows the engine's phase",
    "job.changing": "a changed job is written, not committed",
    "job.ended": "the engine has ended, nothing of it is stored",
    "job.concluded": "the job's row says how it ended, its lease is held",
    "job.released": "its lease is released",
    "job.adopting": "an adoption is written, not committed",
    "job.adopted": "an adoption is committed",
    "job.queued-again": "a crashed job waits in the queue, its lease is held",
    "lease.renewing": "a renewed lease is written, not committed",
    "lease.renewed": "a renewed lease is committed",
    "row.adding": "a row is written, not committed",
    "row.added": "a row is committed",
    "file.written": "a file is flushed as `name.tmp`",
    "file.replaced": "it has its name",
    "engine.begun": "the engine process has its lock, and has said nothing",
    "engine.ran": "the stage has returned, `result.json` is not written",
    "engine.result": "`result.json` is written, the last event is not",
    "event.numbered": "an event has its number, and is not in the file",
    "event.appended": "an event is in the file",
    "control.read": "a request has been read, its file is still there",
    "control.taken": "its file is gone, the request is not obeyed",
    "tokens.begun": "the partial token store is there",
    "tokens.appended": "a chunk is in it, its line in the journal is not",
    "tokens.journaled": "the line too",
    "tokens.unjournaled": "the journal is gone, the store has no manifest",
    "tokens.sealed": "the store is flushed, under its partial name",
    "tokens.renamed": "the store has its name",
    "train.started": "the model is loaded, no step is taken",
    "train.resumed": "a checkpoint has been read",
    "train.step": "a step is taken, and not reported",
    "train.evaluated": "a validation is reported, its weights are not kept",
    "train.saved": "a checkpoint is whole, and not reported",
    "train.retiring": "a checkpoint is whole, an older one is to be removed",
    "train.finished": "the last step is taken and saved",
    "train.written": "the adapter is in the job folder, the caches are too",
    "outcome.added": "the adapter has its row, the job does not say so",
    "export.merged": "base and adapter are one in memory and compared, nothing is written",
    "export.proved": "what was written answers as it should, `export.json` is not written",
}
POINTS = {
    **STEPS,
    **{f"{kind}.{step}": f"{what}: {where}" for kind, what in FOLDERS.items() for step, where in FOLDER_STEPS.items()},
}


@dataclass(frozen=True)
class Fault:
    """What happens at the `hit`-th time, counted from 1."""

    hit: int
    kind: Kind


class Faults:
    """What this process was ordered to do at which point, and how often each was hit."""

    def __init__(self, orders: str, counts: str | None) -> None:
        self.orders = dict(parsed(order) for order in filter(None, orders.split(",")))
        self.counts = counts
        self.hits: Counter[str] = Counter()

    def hit(self, name: str) -> None:
        if name not in POINTS:
            raise ValueError(f"{name!r} is not in lorasmith.faults.POINTS")
        self.hits[name] += 1
        number = self.noted(name) if self.counts else self.hits[name]
        fault = self.orders.get(name)
        if fault is None or number != fault.hit:
            return
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = errno.ENOSPC if fault.kind == "enospc" else errno.EIO
        raise OSError(code, f"{os.strerror(code)}, as ordered at {name}")

    def noted(self, name: str) -> int:
        """How often all processes have been here, this time included."""
        handle = os.open(str(self.counts), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, f"{name} {os.getpid()}\n".encode())
            lines = os.pread(handle, os.lseek(handle, 0, os.SEEK_CUR), 0).decode().splitlines()
        finally:
            os.close(handle)
        return sum(line.split()[0] == name for line in lines)


def parsed(order: str) -> tuple[str, Fault]:
    """
    >>> parsed("checkpoint.sealed:2:kill")
    ('checkpoint.sealed', Fault(hit=2, kind='kill'))
    """
    parts = order.split(":")
    if len(parts) != 3 or parts[0] not in POINTS or not parts[1].isdigit() or parts[2] not in get_args(Kind):
        kinds = "|".join(get_args(Kind))
        raise ValueError(f"{FAULT_VARIABLE} is NAME:HIT:{kinds} with a name of lorasmith.faults.POINTS, got {order!r}")
    return parts[0], Fault(int(parts[1]), parts[2])  # type: ignore[arg-type]  # compared with the kinds above


def ordered() -> Faults | None:
    """What the environment orders; None when it says nothing."""
    orders, counts = os.environ.get(FAULT_VARIABLE, ""), os.environ.get(COUNTS_VARIABLE)
    return Faults(orders, counts) if orders or counts else None


FAULTS = ordered()


def fault_point(name: str) -> None:
    """Does nothing, in 50 ns, unless the environment names a fault or a file of counts. `name` is one of `POINTS`."""
    if FAULTS is not None:
        FAULTS.hit(name)
