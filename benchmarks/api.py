"""The server under load: reads, streams, what it costs the training beside it, and how soon a dead worker is noticed.

python benchmarks/api.py: JSON lines, one closing line per claim, exit 1 when short. `--only reads,streams,cost,worker` takes
some of them. The home holds 10,000 jobs, one of which has 1,000,000 metric points; reads alternate over six routes. There is
no peer that serves these routes; the bars are absolute, on two cores.

The event of a step is timed from its line in the file to its arrival at a client over TCP. CPU is user and system time of
the server process against that of the engine process beside it, over the same wall time, with 200 clients on
the training job's metrics, 50 of which never read.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import httpx
import psutil
from report import Bar, close, emit
from sqlalchemy import insert

from lorasmith.files import new_id
from lorasmith.schemas.data import DataImportSpec
from lorasmith.schemas.jobs import Job, JobKind, JobStatus
from lorasmith.schemas.training import TrainingSpec
from lorasmith.services.access import api_token
from lorasmith.services.data_import import import_dataset
from lorasmith.services.training import start_training
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from lorasmith.starter.location import starter_dataset
from lorasmith.store.database import JobRecord, transaction

NAME = "api"
V1 = "/api/v1/finetune"
JOBS, POINTS = 10_000, 1_000_000
READS = 1_200
READ_BAR_MS, STREAM_BAR_MS = 50.0, 500.0
IDLE_CPU_BAR, CLIENTS_CPU_BAR, MEMORY_BAR_MB = 0.01, 0.05, 100.0
NOTICE_BAR_S, HEALTH_BAR_S, EVENTS_BAR = 15.0, 3.0, 0.005
CLIENTS, DEAF = 200, 50
STEP = {"step": 1, "total_steps": POINTS, "epoch": 0.1, "loss": 1.234, "learning_rate": 1e-4, "grad_norm": 0.5}


class Server:
    """`lorasmith serve` of a home on a free port, with or without its worker."""

    def __init__(self, home: Path, *options: str) -> None:
        command = [sys.executable, "-m", "lorasmith", "--home", str(home), "serve", "--port", "0", "--json", *options]
        began = time.perf_counter()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.url = json.loads("".join(iter(self.process.stdout.readline, "}\n")) + "}")["url"]
        self.headers = {"Authorization": f"Bearer {api_token(home)}"}
        self.client = httpx.Client(base_url=self.url, headers=self.headers, timeout=60, trust_env=False)
        self.client.get("/healthz").raise_for_status()
        self.healthy_after_s = time.perf_counter() - began

    def cpu_s(self) -> float:
        used = psutil.Process(self.process.pid).cpu_times()
        return float(used.user + used.system)

    def memory_mb(self) -> float:
        return float(psutil.Process(self.process.pid).memory_info().rss / 1e6)

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait()


@contextmanager
def serving(home: Path, *options: str) -> Iterator[Server]:
    server = Server(home, *options)
    try:
        yield server
    finally:
        server.stop()


def fill(workbench: Workbench) -> str:
    """Ten thousand ended jobs; returns the id of the one with a million points."""
    rows = []
    for _ in range(JOBS):
        job_id = new_id("job")
        spec = TrainingSpec(model="starter", data="signatures").model_dump()
        job = Job(id=job_id, kind=JobKind.TRAINING, name=job_id[-6:], spec=spec, folder=f"jobs/{job_id}")
        job.status, job.base_model = JobStatus.FAILED, "starter"
        rows.append(workbench.jobs.columns(job))
    with transaction(workbench.jobs.engine) as session:
        session.execute(insert(JobRecord), rows)
    large = rows[len(rows) // 2]["id"]
    folder = workbench.path(f"jobs/{large}")
    folder.mkdir(parents=True)
    with (folder / "events.jsonl").open("w", encoding="utf-8") as file:
        for seq in range(1, POINTS + 1):
            line = {"seq": seq, "time": "2026-01-01T00:00:00+00:00", "type": "step", "data": {**STEP, "step": seq}}
            file.write(json.dumps(line) + "\n")
    return str(large)


def read_times_ms(server: Server, large: str, reads: int) -> list[float]:
    """Alternating over six routes, in an order that is the same each time."""
    cursor = server.client.get(f"{V1}/jobs", params={"limit": 1}).json()["next_cursor"]
    routes: list[tuple[str, dict[str, str | int]]] = [
        (f"{V1}/jobs", {"limit": 20}),
        (f"{V1}/jobs", {"limit": 20, "cursor": cursor, "status": "failed"}),
        (f"{V1}/jobs/{large}", {}),
        (f"{V1}/jobs/{large}/metrics", {"limit": 100, "cursor": 700_000}),
        (f"{V1}/jobs/{large}/checkpoints", {}),
        (f"{V1}/datasets", {"limit": 20}),
    ]
    taken: dict[str, list[float]] = {}
    for number in range(reads):
        path, parameters = routes[number % len(routes)]
        began = time.perf_counter()
        server.client.get(path, params=parameters).raise_for_status()
        taken.setdefault(f"{number % len(routes)} {path.replace(large, '{id}')}", []).append(
            (time.perf_counter() - began) * 1000
        )
    for path, times in taken.items():
        emit(NAME, route=path, median_ms=statistics.median(times), p99_ms=percentile(times, 0.99))
    return [one for times in taken.values() for one in times]


def limit(name: str, value: float, most: float) -> Bar:
    """An absolute bar: the peer is the most that it may be."""
    return Bar(name, f"{value:.4g}", f"{most:g}", value / most, 1.0, at_least=False)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def measure_reads(workbench: Workbench, large: str) -> list[Bar]:
    with serving(workbench.home, "--no-worker") as server:
        emit(NAME, healthy_after_s=server.healthy_after_s)
        read_times_ms(server, large, 60)
        p99 = percentile(read_times_ms(server, large, READS), 0.99)
        bars = [
            limit("healthz after the start, s", server.healthy_after_s, HEALTH_BAR_S),
            limit("reads p99, ms", p99, READ_BAR_MS),
        ]
    with training(workbench, cores=1) as (server, _):
        busy = percentile(read_times_ms(server, large, READS // 2), 0.99)
        emit(NAME, reads_p99_ms_while_one_core_trains=busy)
    return bars


@contextmanager
def training(workbench: Workbench, cores: int) -> Iterator[tuple[Server, Job]]:
    """A server whose worker trains the built-in model for as long as the block lasts."""
    dataset = import_dataset(workbench, starter_dataset("signatures"), DataImportSpec(name="signatures"))
    fields = {"num_epochs": 100, "log_every": 1, "eval_every": 100_000, "save_every": 100_000, "batch_size": 8}
    spec = TrainingSpec.model_validate({"model": "starter", "data": dataset.id, "training": fields})
    job = start_training(workbench, spec, cores=cores)
    with serving(workbench.home) as server:
        wait_for(lambda: server.client.get(f"{V1}/jobs/{job.id}").json()["current_step"] > 3, 120)
        yield server, workbench.jobs.require(job.id)
        server.client.delete(f"{V1}/jobs/{job.id}").raise_for_status()
        wait_for(lambda: workbench.jobs.require(job.id).pid is None, 60)


def wait_for(is_there: Callable[[], bool], seconds: float) -> float:
    began = time.perf_counter()
    while not is_there():
        if time.perf_counter() - began > seconds:
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.05)
    return time.perf_counter() - began


def measure_streams(workbench: Workbench) -> list[Bar]:
    """From the line of a step in the file to its arrival."""
    with training(workbench, cores=1) as (server, job):
        delays_ms = []
        path = f"{V1}/jobs/{job.id}/metrics"
        headers = {"Accept": "text/event-stream", "Last-Event-ID": "1"}
        live = False
        with server.client.stream("GET", path, headers=headers) as answer:
            for line in answer.iter_lines():
                if not line.startswith("data: ") or '"seq"' not in line:
                    continue
                arrived = time.time()
                delay_ms = (arrived - iso_seconds(json.loads(line[6:])["time"])) * 1000
                live = live or delay_ms < 2_000  # what was there before the reader is no delay
                if live:
                    delays_ms.append(delay_ms)
                if len(delays_ms) == 200:
                    break
        emit(NAME, stream_median_ms=statistics.median(delays_ms), stream_p95_ms=percentile(delays_ms, 0.95))
    return [limit("event to client p95, ms", percentile(delays_ms, 0.95), STREAM_BAR_MS)]


def iso_seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()


def measure_cost(workbench: Workbench) -> list[Bar]:
    with training(workbench, cores=1) as (server, job):
        assert job.pid is not None
        engine = psutil.Process(job.pid)
        idle = cpu_share(server, engine, 20)
        emit(NAME, server_cpu_per_training_cpu_without_clients=idle)
        before_mb = server.memory_mb()
        readers = Readers(server, f"{V1}/jobs/{job.id}/metrics")
        readers.start()
        time.sleep(5)
        busy = cpu_share(server, engine, 20)
        grown_mb = server.memory_mb() - before_mb
        emit(NAME, clients=CLIENTS, deaf=DEAF, server_cpu_per_training_cpu=busy, grown_mb=grown_mb, read=readers.read)
        readers.stop()
        share = event_share(workbench, job)
    return [
        limit("server CPU per training CPU, no client", idle, IDLE_CPU_BAR),
        limit(f"server CPU per training CPU, {CLIENTS} clients", busy, CLIENTS_CPU_BAR),
        limit(f"memory grown by {CLIENTS} clients, MB", grown_mb, MEMORY_BAR_MB),
        limit("share of a step spent on its event", share, EVENTS_BAR),
    ]


def cpu_share(server: Server, engine: psutil.Process, seconds: float) -> float:
    def of_engine() -> float:
        used = engine.cpu_times()
        return float(used.user + used.system)

    ours, theirs = server.cpu_s(), of_engine()
    time.sleep(seconds)
    return (server.cpu_s() - ours) / (of_engine() - theirs)


def event_share(workbench: Workbench, job: Job) -> float:
    """Writing one event, measured alone, against the median time between two of them in the run."""
    from lorasmith.engine.reporting import Reporter

    lines = (workbench.path(job.folder) / "events.jsonl").read_text(encoding="utf-8").splitlines()
    times = [iso_seconds(one["time"]) for one in map(json.loads, lines) if one["type"] == "step"]
    step_s = statistics.median(after - before for before, after in pairwise(times))
    with tempfile.TemporaryDirectory() as folder:
        report = Reporter(Path(folder))
        taken = []
        for number in range(2_000):
            began = time.perf_counter()
            report("step", **{**STEP, "step": number})
            taken.append(time.perf_counter() - began)
    event_s = statistics.median(taken)
    emit(NAME, event_us=event_s * 1e6, step_ms=step_s * 1e3)
    return event_s / step_s


class Readers:
    """Clients of one stream in a process's thread of their own loop; some connect, ask and never read."""

    def __init__(self, server: Server, path: str) -> None:
        self.server, self.path = server, path
        self.read = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.run()), daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        self.ended.set()
        self.thread.join()

    async def run(self) -> None:
        host, port = self.server.url.removeprefix("http://").split(":")
        token = self.server.headers["Authorization"]
        request = (
            f"GET {self.path} HTTP/1.1\r\nHost: {host}:{port}\r\nAuthorization: {token}\r\n"
            f"Accept: text/event-stream\r\nLast-Event-ID: 1\r\n\r\n"
        ).encode()
        readers = [asyncio.create_task(self.follow(host, int(port), request, n < DEAF)) for n in range(CLIENTS)]
        while not self.ended.is_set():
            await asyncio.sleep(0.1)
        for reader in readers:
            reader.cancel()

    async def follow(self, host: str, port: int, request: bytes, deaf: bool) -> None:
        reader, writer = await asyncio.open_connection(host, port, limit=4096)
        writer.write(request)
        await writer.drain()
        if deaf:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(3600)
        while data := await reader.read(65_536):
            self.read += len(data)


def measure_worker(workbench: Workbench) -> list[Bar]:
    """A worker is killed; another one answers for its job."""
    dataset = import_dataset(workbench, starter_dataset("signatures"), DataImportSpec(name="signatures"))
    spec = TrainingSpec.model_validate({"model": "starter", "data": dataset.id, "training": {"num_epochs": 50}})
    noticed = []
    for _ in range(3):
        job = start_training(workbench, spec, cores=1)
        workers = [worker(workbench) for _ in range(2)]
        try:
            wait_for(lambda job=job: workbench.jobs.require(job.id).pid is not None, 60)
            holder = workbench.jobs.lease_of(job.id)[1]
            dead = next(one for one in workers if holder and f":{one.pid}:" in holder)
            dead.send_signal(signal.SIGKILL)
            noticed.append(wait_for(lambda job=job, holder=holder: workbench.jobs.lease_of(job.id)[1] != holder, 60))
            emit(NAME, dead_worker_noticed_s=noticed[-1])
        finally:
            pid = workbench.jobs.require(job.id).pid
            for one in workers:
                one.kill()
                one.wait()
            if pid:
                os.kill(pid, signal.SIGKILL)
            workbench.jobs.change(job.id, lambda row: setattr(row, "status", JobStatus.CANCELLED))
    return [limit("dead worker noticed, s", max(noticed), NOTICE_BAR_S)]


def worker(workbench: Workbench) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lorasmith", "--home", str(workbench.home), "worker"]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="reads,streams,cost,worker")
    asked = parser.parse_args().only.split(",")
    bars: list[Bar] = []
    with tempfile.TemporaryDirectory() as folder:
        workbench = Workbench.open(Settings(home=Path(folder) / "home"))
        if "reads" in asked:
            bars += measure_reads(workbench, fill(workbench))
        for name, measure in (("streams", measure_streams), ("cost", measure_cost), ("worker", measure_worker)):
            bars += measure(workbench) if name in asked else []
    return close(bars)


if __name__ == "__main__":
    sys.exit(main())
