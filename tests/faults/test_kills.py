"""SIGKILL at every named step, then the same once more: the end is bit for bit that of a life nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lorasmith.faults import COUNTS_VARIABLE, FAULT_VARIABLE, POINTS
from lorasmith.jobs.processes import process_started
from tests.engine.conftest import qwen2_folder, tokenizer  # noqa: F401  # fixtures
from tests.faults.invariants import all_is_done, outcome, whole_at_any_time

MOST_SESSIONS = 6
SEED, SAMPLED = 20_26, 36  # points at a hit beyond the first

# Steps that nobody reaches who was not killed before; several are ordered together, each happens once.
AFTER = {
    "job.adopting": "job.begun",
    "job.adopted": "job.begun",
    "job.queued-again": "train.step",
    "train.resumed": "train.saved",
}
OF_THE_WORKER = (
    "job.claimed",
    "job.started",
    "job.begun",
    "job.phase",
    "job.ended",
    "outcome.added",
    "job.concluded",
    "job.released",
)
BY_THE_CLOCK = ("lease.renewing", "lease.renewed")  # reached more often in a life that takes longer
SHORT = (
    "import.committed",
    "tokens.appended",
    "checkpoint.sealed",
    "engine.result",
    "kept-adapter.renamed",
    "export.renamed",
)


@dataclass
class Life:
    """One home folder, its sessions and who ended how."""

    folder: Path
    counts: Counter[str]
    ends: dict[int, int]  # returncodes by process

    @property
    def home(self) -> Path:
        return self.folder / "home"


Lives = Callable[..., Life]


@pytest.fixture(scope="module")
def lives(qwen2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:  # noqa: F811
    """Call it with faults to live with them: sessions until one reaches its end."""
    base = tmp_path_factory.mktemp("faults")
    source = base / "rows.csv"
    lines = [f"Count from {n}.,{' '.join(str(n + more) for more in range(1 + n % 5))}\n" for n in range(14)]
    source.write_text("input,output\n" + "".join(lines), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    preloaded = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.sessions"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert preloaded.stdin is not None
    assert preloaded.stdout is not None

    def live(name: str, *orders: str) -> Life:
        folder = base / name
        folder.mkdir()
        variables = {
            FAULT_VARIABLE: ",".join(orders),
            COUNTS_VARIABLE: str(folder / "counts"),
            "FAULT_TEST_ENDS": str(folder / "ends"),
        }
        ends: dict[int, int] = {}
        for number in range(MOST_SESSIONS):
            paths = {"home": folder / "home", "source": source, "model": qwen2_folder, "log": folder / "log"}
            case = {**{key: str(path) for key, path in paths.items()}, "number": number, "environment": variables}
            preloaded.stdin.write(json.dumps(case) + "\n")
            preloaded.stdin.flush()
            answer = json.loads(preloaded.stdout.readline())
            ends[answer["pid"]] = answer["returncode"]
            whole_at_any_time(folder / "home")
            if answer["returncode"] != -signal.SIGKILL:
                break
        assert answer["returncode"] == 0, (folder / "log").read_text(encoding="utf-8")[-4000:]
        hits = (folder / "counts").read_text(encoding="utf-8").splitlines()
        engines = (folder / "ends").read_text(encoding="utf-8").splitlines()
        ends |= {int(pid): int(code) for pid, code in map(str.split, engines)}
        return Life(folder, Counter(line.split()[0] for line in hits), ends)

    yield live
    preloaded.stdin.close()
    assert preloaded.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def undisturbed(lives: Lives) -> Life:
    life = lives("undisturbed")
    all_is_done(life.home)
    return life


@pytest.fixture(scope="module")
def expected(undisturbed: Life) -> dict[str, Any]:
    return outcome(undisturbed.home)


def killed_and_done_again(lives: Lives, expected: dict[str, Any], point: str, hit: int = 1) -> None:
    orders = [f"{point}:{hit}:kill"]
    if point in AFTER:
        orders.insert(0, f"{AFTER[point]}:1:kill")
    life = lives(f"{point}-{hit}", *orders)
    all_died(life, *orders)
    all_is_done(life.home)
    assert outcome(life.home) == expected
    print(f"{point}: killed at hit {hit} of {life.counts[point]}, {len(life.ends)} processes")


def all_died(life: Life, *orders: str) -> None:
    """Each order has ended one process, by SIGKILL; one that lives on is an error."""
    victims = [victim(life, *order.split(":")[:2]) for order in orders]
    assert len({*victims}) == len(orders)
    for pid in victims:
        assert process_started(pid) is None, f"process {pid} lives"
        assert life.ends[pid] == -signal.SIGKILL


def victim(life: Life, point: str, hit: str) -> int:
    """The process that was at this hit."""
    lines = [line.split() for line in (life.folder / "counts").read_text(encoding="utf-8").splitlines()]
    there = [int(pid) for name, pid in lines if name == point]
    assert len(there) >= int(hit), f"{point} was reached {len(there)} times, and should have been {hit} times"
    return there[int(hit) - 1]


def test_an_undisturbed_life_passes_every_point_but_those_after_a_crash(undisturbed: Life) -> None:
    for point in POINTS:
        print(f"{point}: {undisturbed.counts[point]} hits")
    assert set(undisturbed.counts) == set(POINTS) - set(AFTER)


def test_one_life_with_six_kills(lives: Lives, expected: dict[str, Any]) -> None:
    life = lives("six", *(f"{point}:1:kill" for point in SHORT))
    all_died(life, *(f"{point}:1:kill" for point in SHORT))
    all_is_done(life.home)
    assert outcome(life.home) == expected


@pytest.mark.faults
@pytest.mark.parametrize("point", sorted(POINTS))
def test_killed_at_a_step(lives: Lives, expected: dict[str, Any], point: str) -> None:
    killed_and_done_again(lives, expected, point)


@pytest.mark.faults
@pytest.mark.parametrize("sample", range(SAMPLED))
def test_killed_at_a_later_hit(lives: Lives, expected: dict[str, Any], undisturbed: Life, sample: int) -> None:
    repeated = sorted(point for point, hits in undisturbed.counts.items() if hits > 1 and point not in BY_THE_CLOCK)
    point = repeated[sample % len(repeated)]
    hit = random.Random(SEED + sample).randint(2, min(undisturbed.counts[point], 40))
    killed_and_done_again(lives, expected, point, hit)


@pytest.mark.faults
@pytest.mark.parametrize("point", OF_THE_WORKER)
def test_the_worker_lives_on_after_a_broken_disk(lives: Lives, expected: dict[str, Any], point: str) -> None:
    """The engine that runs then goes on, too: nothing is done twice."""
    life = lives(f"{point}-eio", f"{point}:1:eio")
    assert set(life.ends.values()) == {0}
    assert life.counts["engine.begun"] == 2, "one engine for the training, one for the export"
    all_is_done(life.home)
    assert outcome(life.home) == expected
