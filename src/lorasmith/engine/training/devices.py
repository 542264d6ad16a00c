"""Several processes that take each optimizer step together: rows are shared out, gradients and losses are summed.

The first process launches the others, speaks for the job and writes its files. All hold the same weights and optimizer
state, as each adds the same sum of gradients to the same weights. accelerate's collectives carry the sums.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, distributed, nn
from torch.distributed import FileStore, Store  # type: ignore[attr-defined]

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.out_of_memory import ran_out_of_memory
from lorasmith.errors import JobFailed, Killed

T = TypeVar("T")

TIMEOUT_S = 1800.0  # one process may measure, compile or save while the others wait
BUCKET_ELEMENTS = 1 << 23  # summed at once: few collectives, and 32 MB of copies instead of all gradients
RENDEZVOUS = "rendezvous"
PEER = "lorasmith.engine.training.peer"
LOOPBACK = {"linux": "lo", "darwin": "lo0"}


class Devices:
    """This process among those of a run; alone unless `launch` or `join` made it. `rank` counts from 0."""

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        peers: Sequence[subprocess.Popen[bytes]] = (),
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`peers` are the processes that this one launched; none may be silent for `timeout_s`."""
        self.timeout_s = timeout_s
        self.rank = rank
        self.count = count
        self.peers = peers

    @property
    def first(self) -> bool:
        """Whether this process speaks for the job and writes its files."""
        return self.rank == 0

    def share(self, indices: Sequence[int], rows: Sequence[RenderedExample]) -> list[int]:
        """The rows that this process computes."""
        return self.shares(indices, rows)[self.rank]

    def shares(self, indices: Sequence[int], rows: Sequence[RenderedExample]) -> list[list[int]]:
        """The rows that each process computes, by rank."""
        return shares(indices, [len(rows[index].ids) for index in indices], self.count)

    def gather(self, value: T) -> list[T]:
        """The value of each process, by rank."""
        if self.count == 1:
            return [value]
        with self.together():
            gathered: list[T] = gather_object([value])
        return gathered

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each `.grad` by its sum over the processes; where no process has one, none is made."""
        if self.count == 1:
            return
        for bucket in buckets(parameters):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            present = gradients[0].new_tensor([p.grad is not None for p in bucket])
            flat = self.summed(torch.cat([present, *(gradient.flatten() for gradient in gradients)]))
            present, *sums = flat.split([len(bucket), *(p.numel() for p in bucket)])
            for parameter, exists, total in zip(bucket, present, sums, strict=True):
                parameter.grad = total.view_as(parameter) if exists else None

    def agree(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.count == 1:
            return value
        with self.together():
            agreed: T = broadcast_object_list([value])[0]
        return agreed

    def found_by_first(self, find: Callable[[], T]) -> T:
        """What `find` returns in the first process, in every process."""
        found: Any = self.agree(find() if self.first else None)
        return cast(T, found)

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """The first process does what is inside, and the others when it has: they find the files that it wrote."""
        if not self.first:
            self.agree(None)
        yield
        if self.first:
            self.agree(None)

    def summed(self, tensor: Tensor) -> Tensor:
        with self.together():
            total: Tensor = reduce(tensor, reduction="sum")
        return total

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raises `JobFailed` that names the process which left; in a launched process, ends it."""
        try:
            yield
        except RuntimeError as error:
            if ran_out_of_memory(error):
                raise
            if not self.first:
                raise SystemExit(1) from error  # the first one gives the reason
            raise self.lost() from error

    def lost(self) -> JobFailed:
        """Which process is gone, and how it went."""
        deadline = time.monotonic() + min(5.0, self.timeout_s)  # a death is known a moment after its connection closed
        while time.monotonic() < deadline:
            for number, peer in enumerate(self.peers, start=2):
                if peer.poll() is not None:
                    return ended(number, self.count, peer.returncode)
            time.sleep(0.05)
        text = f"one of {self.count} processes has not answered for {self.timeout_s:g} s"
        return JobFailed(text, code="crashed", hint="log.txt may say why")

    def leave(self) -> None:
        """The steps are taken: what is left is for the first process, the others end here."""
        if not self.first:
            raise SystemExit(0)


def shares(indices: Sequence[int], tokens: Sequence[int], count: int) -> list[list[int]]:
    """`indices` dealt to `count` processes: the longest first, each to the one with the fewest tokens so far."""
    if count == 1:
        return [list(indices)]
    dealt: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for length, index in sorted(zip(tokens, indices, strict=True), key=lambda row: (-row[0], row[1])):
        least = loads.index(min(loads))
        dealt[least].append(index)
        loads[least] += length
    return dealt


def buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    elements = 0
    for parameter in parameters:
        bucket.append(parameter)
        elements += parameter.numel()
        if elements >= BUCKET_ELEMENTS:
            yield bucket
            bucket, elements = [], 0
    if bucket:
        yield bucket


def ended(number: int, count: int, returncode: int) -> JobFailed:
    """`Killed` where the system may have done it for memory."""
    how = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with status {returncode}"
    hint = "log.txt has its last words; what was saved goes on with `lorasmith train --resume`"
    if returncode == -signal.SIGKILL:
        return Killed(f"process {number} of {count} {how}", code="oom", hint=hint)
    return JobFailed(f"process {number} of {count} {how}", code="crashed", hint=hint)


@contextmanager
def launch(count: int, folder: Path, module: str = PEER, *, timeout_s: float = TIMEOUT_S) -> Iterator[Devices]:
    """The first of `count` processes; the others run `python -m module folder rank count`, which calls `join`.

    They end with this process, however it ends. The cores are divided among them unless OMP_NUM_THREADS is set.
    Raises `JobFailed` when one of them dies, or does not answer for `timeout_s`.
    """
    if count == 1:
        yield Devices()
        return
    before, rendezvous = torch.get_num_threads(), folder / RENDEZVOUS
    threads = before if "OMP_NUM_THREADS" in os.environ else max(1, before // count)
    rendezvous.unlink(missing_ok=True)  # of a run that was killed
    peers: list[subprocess.Popen[bytes]] = []
    with environment(rank_variables(0, count, threads)):
        try:
            torch.set_num_threads(threads)
            for rank in range(1, count):
                command = [sys.executable, "-m", module, str(folder), str(rank), str(count)]
                peers.append(subprocess.Popen(command, stdin=subprocess.PIPE))
            devices = Devices(0, count, peers, timeout_s)
            store = FileStore(str(rendezvous), count)
            wait_for(devices, store)
            with devices.together():
                connect(devices, store)
            yield devices
        finally:
            for peer in peers:
                peer.kill()
                peer.wait()
                if peer.stdin:
                    peer.stdin.close()
            disconnect()
            torch.set_num_threads(before)
            rendezvous.unlink(missing_ok=True)


def join(folder: Path, rank: int, count: int) -> Devices:
    """A launched process: it stays until the first process closes its standard input, by design or by dying."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the first process decides when all stop
    threading.Thread(target=end_with_input, daemon=True).start()
    os.environ.update(rank_variables(rank, count, torch.get_num_threads()))
    devices, store = Devices(rank, count), FileStore(str(folder / RENDEZVOUS), count)
    store.set(f"here/{rank}", "")
    with devices.together():
        connect(devices, store)
    return devices


def end_with_input() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through the buffer, whose lock would disturb a normal end
    os._exit(1)


def wait_for(devices: Devices, store: Store) -> None:
    """Return when all have come; starting takes seconds, and one that dies meanwhile would be waited for in vain."""
    missing = [f"here/{rank}" for rank in range(1, devices.count)]
    deadline = time.monotonic() + devices.timeout_s
    while not store.check(missing):
        for number, peer in enumerate(devices.peers, start=2):
            if peer.poll() is not None:
                raise ended(number, devices.count, peer.returncode)
        if time.monotonic() > deadline:
            raise devices.lost()
        time.sleep(0.05)


def connect(devices: Devices, store: Store) -> None:
    timeout = timedelta(seconds=devices.timeout_s)
    distributed.init_process_group("gloo", store=store, rank=devices.rank, world_size=devices.count, timeout=timeout)
    PartialState._reset_state()  # whoever made it before was alone
    assert PartialState(cpu=True).num_processes == devices.count


def disconnect() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()
    PartialState._reset_state()


def rank_variables(rank: int, count: int, threads: int) -> dict[str, str]:
    """What accelerate and gloo read; the processes are on one machine and need no network."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    values = {key: str(value) for key, value in {**ranks, "OMP_NUM_THREADS": threads}.items()}
    return values | ({"GLOO_SOCKET_IFNAME": LOOPBACK[sys.platform]} if sys.platform in LOOPBACK else {})


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """These variables for a while, also for what is started meanwhile."""
    before = {key: os.environ.get(key) for key in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
