"""A process that has loaded torch once and forks a session for each line on its standard input; engines are forked too.

A session does what a person does again after a crash: the same import, the same training order unless there is one, a worker
until it is done, and an export. Its leases are on a clock that the session moves.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

SESSION_S = 120  # a session or an engine that takes longer is ended by SIGALRM
LATER_S = 1_000.0  # between two sessions, for leases: all of the first one's are over


class ForkedEngine:
    """Takes the place of `subprocess.Popen`: the same engine, forked from this process instead of started anew.

    It waits until `let_go`, or until the session is dead.
    """

    started: ClassVar[list[ForkedEngine]] = []

    def __init__(
        self, command: list[str], *, stdout: IO[bytes], pass_fds: tuple[int], env: Mapping[str, str], **_: Any
    ) -> None:
        waiting, self.gate = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            run_engine(command[-1], stdout.fileno(), pass_fds[0], waiting, env)
        os.close(waiting)
        self.started.append(self)

    def let_go(self) -> None:
        if self.gate >= 0:
            os.close(self.gate)
            self.gate = -1

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.end(status)
        return self.returncode

    def wait(self) -> int:
        if self.returncode is None:
            self.end(os.waitpid(self.pid, 0)[1])
        assert self.returncode is not None
        return self.returncode

    def end(self, status: int) -> None:
        self.returncode = os.waitstatus_to_exitcode(status)
        note_end(self.pid, self.returncode)


def run_engine(folder: str, log: int, lock: int, waiting: int, env: Mapping[str, str]) -> None:
    """What `exec` would have left of this process, and then the engine."""
    code = 70
    try:
        os.setsid()
        signal.alarm(SESSION_S)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        kept = {0, 1, 2, lock, waiting}
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor not in kept:
                try:
                    os.close(descriptor)
                except OSError:  # the listing's own
                    continue
        os.environ.clear()
        os.environ.update(env)
        os.read(waiting, 1)
        os.close(waiting)

        from lorasmith.engine.__main__ import main

        code = main([folder])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def note_end(pid: int, returncode: int) -> None:
    with open(os.environ["FAULT_TEST_ENDS"], "a", encoding="utf-8") as ends:
        ends.write(f"{pid} {returncode}\n")


def live(home: Path, source: Path, model: Path, number: int) -> None:
    """Until the dataset, the adapter and the export are there."""
    from lorasmith.jobs import processes
    from lorasmith.jobs.leases import RENEW_S
    from lorasmith.schemas.adapters import ExportSpec
    from lorasmith.schemas.data import DataImportSpec
    from lorasmith.schemas.jobs import Job, JobKind, JobRequest, JobStatus
    from lorasmith.schemas.training import TrainingSpec
    from lorasmith.services.adapters_export import queue_export
    from lorasmith.services.data_import import import_dataset
    from lorasmith.services.jobs import BACKOFF_S, ask
    from lorasmith.services.training import start_training
    from lorasmith.services.workbench import Workbench
    from lorasmith.services.worker import Worker
    from lorasmith.settings import Settings
    from lorasmith.store import jobs as queue
    from lorasmith.store import leases

    processes.subprocess.Popen = ForkedEngine  # type: ignore[misc, assignment]
    passed = [number * LATER_S]
    queue.uptime = lambda: leases.uptime() + passed[0]
    workbench = Workbench.open(Settings(home=home))

    def tell(job: Job, text: str) -> None:
        print(job.id, text, flush=True)
        if job.kind is JobKind.TRAINING and text.startswith("started as process"):
            ask(workbench, job, JobRequest.CHECKPOINT)
        for engine in ForkedEngine.started:
            engine.let_go()

    worker = Worker(workbench, 1, tell)

    def finished(kind: JobKind) -> Job | None:
        """The job of this kind, once it has ended; None when there is none."""
        renewal = 0.0
        while True:
            found = [job for job in workbench.jobs.list() if job.kind is kind]
            if not found:
                return None
            if found[0].status not in {JobStatus.QUEUED, *queue.ACTIVE}:
                assert found[0].status is JobStatus.COMPLETED, f"{kind}: {found[0].status}, {found[0].reason}"
                return found[0]
            worker.next_claim = worker.next_adoption = 0.0
            worker.look()
            if time.monotonic() >= renewal:
                renewal = time.monotonic() + RENEW_S
                worker.keeper.renew_once()
            if not worker.running:
                passed[0] += max(BACKOFF_S)
            time.sleep(0.005)

    import_dataset(workbench, source, DataImportSpec(name="counting", split=(0.7, 0.3, 0.0), exact=True))
    if finished(JobKind.TRAINING) is None:
        settings = {
            "learning_rate": 1e-2,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "num_epochs": 2,
            "precision": "fp32",
            "memory": "lean",
            "micro_batch_tokens": 1,  # each row alone: after a kill there is no smaller micro-batch
            "log_every": 1,
            "save_every": 2,
            "eval_every": 2,
            "keep_checkpoints": 1,
            "keep_best": True,
            "max_seq_length": 128,
        }
        lora = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all"}
        spec = {"model": str(model), "data": "counting", "name": "tiny", "lora": lora, "training": settings}
        start_training(workbench, TrainingSpec.model_validate(spec))
        finished(JobKind.TRAINING)
    if finished(JobKind.EXPORT) is None:
        queue_export(workbench, ExportSpec(adapter="tiny", kind="merged"))
        finished(JobKind.EXPORT)


def session(case: Mapping[str, Any]) -> None:
    """In a forked process: with the orders of the case, everything it prints in a log."""
    from lorasmith import faults

    code = 1
    try:
        signal.alarm(SESSION_S)
        log = os.open(case["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(case["environment"])
        faults.FAULTS = faults.ordered()
        live(Path(case["home"]), Path(case["source"]), Path(case["model"]), case["number"])
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def preload() -> None:
    """What each engine would load and compute anew; nothing of it starts a thread."""
    import alembic.command  # noqa: F401
    import matplotlib
    import peft.tuners.lora  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    import lorasmith.engine.__main__
    import lorasmith.engine.adapters.export
    import lorasmith.engine.training.run
    import lorasmith.services.worker  # noqa: F401

    get_checkpoint_conversion_mapping("qwen2")  # compiles a thousand expressions, once a process
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.figure().savefig(io.BytesIO())
    pyplot.close("all")


def main() -> None:
    preload()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a process of {len(threads)} threads is not to be forked"
    for line in sys.stdin:
        case = json.loads(line)
        pid = os.fork()
        if pid == 0:
            session(case)
        returncode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"pid": pid, "returncode": returncode}), flush=True)


if __name__ == "__main__":
    main()
