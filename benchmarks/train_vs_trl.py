"""LoRA training on a CPU: ours against TRL and the other peers of peers/, on the rows of workload.py.

python benchmarks/train_vs_trl.py [--full] [--shape NAME]: JSON lines, one closing line per bar, exit 1 when short. The
first run makes the environments of the peers that it races (--full: of all, 13 GB), the base model and TRL's reference
losses under --cache; they stay there.

The 12 minutes of a run without --full, at 45 tokens/s for the best peers and 27 for TRL's default. A process trains
steps 0 and 2 and is timed on step 2: 755 and 725 tokens, padded to 808 and 1,248 (0.58 of step 2 is not padding; 0.64 of
all four steps is not). TRL's default pads, which is 42 padded tokens/s. A peer needs about 15 s to start, ours 20 s
(compiling, packing).

    TRL's default            3 x (2,056 / 42 + 15)      192 s
    two best peer settings   6 x (1,480 / 45 + 15)      288 s
    ours, fast               3 x (1,480 / 185 + 20)      84 s
    ours, lean               3 x (1,480 / 165 + 12)      63 s
    ours, least memory       3 x (1,480 / 120 + 12)      73 s   layers computed again, nothing compiled
    ours on steps 1 and 3    2 x (2,463 / 175)           28 s   first alternation only: their losses are compared
    ours, dropout 0.05       1,480 / 185 + 20            28 s   once; the peers' dropout is measured by --full
    matrix rate                                          12 s
                                                        768 s

A slower machine ends after fewer alternations, and the output says so. --full searches the peers' settings, then runs
three alternations over all four steps (step 0 excluded), with and without dropout.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import workload
from peers import candidates, runner
from peers.candidates import Peer
from report import close, emit
from training_bars import DROPOUT, judge, ours_name, speed

from lorasmith.engine.models.precision import DTYPES, Precision, choose_memory, choose_precision

BENCHMARK = "train_vs_trl"
ALTERNATIONS = 3
TIME_LIMIT_S = 12 * 60.0
TIMED_PAIR = [0, 2]  # see the arithmetic above
ALL_STEPS = [0, 2, 1, 3]  # begins with the timed pair, so that losses compare whichever of the two a run trained
EXTRA_WARM_STEP = 1  # trained before the others where one is not enough
OURS: dict[str, dict[str, Any]] = {
    "fast": {"memory": "fast", "micro_batch_tokens": 4096},  # a whole step at once
    "lean": {"memory": "lean", "micro_batch_tokens": 1024},  # as few tokens as take no longer
    "least": {"memory": "lean", "micro_batch_tokens": 384, "recompute": True, "compiled": False},
}
NATIVE_BF16 = 1.3  # bf16 products this much faster than float32 ones are native

Answer = runner.Answer


@dataclass
class Contest:
    """Where the files of one shape are, how to run each library on them, and what has been measured so far."""

    shape: str
    cache: Path
    threads: int | None
    workers: dict[str, runner.Worker] = field(default_factory=dict)
    answers: dict[str, list[Answer]] = field(default_factory=dict)

    @property
    def config(self) -> workload.Config:
        return workload.SHAPES[self.shape]

    @property
    def folder(self) -> Path:
        return self.cache / self.shape

    def prepare(self, libraries: list[str]) -> None:
        """Environments, rows, base model and first adapter, whatever of them is missing."""
        self.workers = {library: runner.library_worker(library, self.cache / "venvs") for library in libraries}
        self.folder.mkdir(parents=True, exist_ok=True)
        workload.write_rows(workload.make_rows(self.config), self.folder / "rows.jsonl")
        lora = {"r": workload.LORA_RANK, "lora_alpha": workload.LORA_ALPHA, "target_modules": workload.LORA_MODULES}
        settings = {"config": self.config, "folder": str(self.folder), "seed": 0, "lora": lora}
        stamp = self.folder / "base-model.json"
        if not stamp.exists() or json.loads(stamp.read_text(encoding="utf-8")) != json.loads(json.dumps(settings)):
            runner.own_worker("base_model_worker.py").run(settings)
            stamp.write_text(json.dumps(settings), encoding="utf-8")

    def run(
        self, name: str, library: str, settings: dict[str, Any], steps: list[int], warm_steps: int = 1, **notes: Any
    ) -> Answer:
        """One process; its answer is printed and kept under the name. The first warm_steps of the steps are not timed."""
        settings = {
            "model": str(self.folder / "model"),
            "adapter": str(self.folder / "adapter"),
            "rows": str(self.folder / "rows.jsonl"),
            "rows_per_step": workload.ROWS_PER_STEP,
            "steps": steps,
            "learning_rate": workload.LEARNING_RATE,
            "seed": 0,
            **settings,
        }
        answer = {**self.workers[library].run(settings), "warm_steps": warm_steps}
        command = self.workers[library].command_line(settings)
        emit(BENCHMARK, run=name, **notes, tokens_per_second=speed(answer), **answer, command=command)
        self.answers.setdefault(name, []).append(answer)
        return answer

    def run_peer(self, peer: Peer, steps: list[int], name: str | None = None, **notes: Any) -> Answer:
        warm_up = [EXTRA_WARM_STEP] * (peer.warm_steps - 1)
        return self.run(
            name or peer.name, peer.library, peer.settings(), [*warm_up, *steps], warm_steps=peer.warm_steps, **notes
        )

    def run_ours(
        self,
        mode: str,
        precision: str,
        steps: list[int],
        dropout: float = 0.0,
        micro_batch_tokens: int | None = None,
        **notes: Any,
    ) -> Answer:
        settings = {
            "precision": precision,
            "threads": self.threads,
            "batching": "fixed",
            "dropout": dropout,
            "recompute": False,
            "compiled": True,
            **OURS[mode],
            **({"micro_batch_tokens": micro_batch_tokens} if micro_batch_tokens else {}),
        }
        return self.run(ours_name(mode, dropout), "lorasmith", settings, steps, **notes)


def available_bytes() -> int:
    """Memory that can be had without swapping (Linux), else all of it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_matrix_rate(config: workload.Config, threads: int | None) -> Answer:
    """GFLOP/s of torch.mm in float32 and bf16 at the model's shapes, for the rows of a mean step."""
    rows = workload.make_rows(config)
    steps = len(rows) / workload.ROWS_PER_STEP
    per_step = {"layers": workload.tokens_of(rows) / steps, "head": workload.labelled_tokens_of(rows) / steps}
    products = [(product, per_step["layers"]) for product in workload.layer_products(config)]
    products.append((workload.head_product(config), per_step["head"]))
    settings = {
        "threads": threads,
        "repeats": 5,
        "products": [
            {
                "name": product.name,
                "rows": round(count / 32) * 32,  # an odd number of rows is slower, and no fair yardstick
                "in_features": product.in_features,
                "out_features": product.out_features,
                "count": product.count,
            }
            for product, count in products
        ],
    }
    rate = runner.own_worker("matrix_rate_worker.py").run(settings)
    emit(BENCHMARK, run="matrix rate", **rate)
    return rate


def own_choice(precision: Precision, config: workload.Config) -> str:
    """What `training.memory=auto` comes to on this machine: fast where packed weights fit and are faster, and in int16, which
    has no second layout but keeps attention weights."""
    one_copy = workload.weight_bytes(config, DTYPES[precision].itemsize)
    mode = "fast" if precision == "int16" else choose_memory("auto", precision, one_copy)
    emit(BENCHMARK, run="choice", precision=precision, memory=mode)
    return mode


def reference_losses(contest: Contest) -> dict[str, Answer] | None:
    """TRL's losses in float32 and bf16 on all four steps, measured once and kept; None where memory is too small."""
    requirements = (runner.HERE / "requirements-trl.txt").read_bytes()
    loaded = [(contest.folder / name).read_bytes() for name in ("base-model.json", "rows.jsonl")]
    key = hashlib.sha256(b"".join([requirements, *loaded])).hexdigest()
    path = contest.folder / "reference-losses.json"
    if path.exists() and (kept := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
        return {name: kept[name] for name in candidates.LOSS_REFERENCES}
    if not all(peer.fits(contest.config, available_bytes()) for peer in candidates.LOSS_REFERENCES.values()):
        return None
    answers = {
        name: contest.run_peer(peer, ALL_STEPS, f"reference {name}")
        for name, peer in candidates.LOSS_REFERENCES.items()
    }
    path.write_text(json.dumps({"key": key, **answers}), encoding="utf-8")
    return answers


def search_peers(contest: Contest, keep: int) -> list[Peer]:
    """Try every setting that fits on the timed pair of steps, then threads and compilation of the best two."""
    found: dict[Peer, float] = {}

    def attempt(peer: Peer) -> None:
        if not peer.fits(contest.config, available_bytes()):
            emit(BENCHMARK, run=peer.name, stage="search", refused="its weights do not fit into memory")
            return
        try:
            found[peer] = speed(contest.run_peer(peer, TIMED_PAIR, f"search: {peer.name}", stage="search"))
        except runner.WorkerFailed as error:
            emit(BENCHMARK, run=peer.name, stage="search", refused=str(error).splitlines()[-1])

    for peer in candidates.search_candidates():
        attempt(peer)
    for peer in sorted(found, key=found.__getitem__, reverse=True)[:2]:
        for variant in candidates.variants(peer, len(os.sched_getaffinity(0))):
            attempt(variant)
    fastest: dict[Peer, Peer] = {}  # of those that differ in threads and compilation only
    for peer in sorted(found, key=found.__getitem__, reverse=True):
        fastest.setdefault(replace(peer, threads=None, compile=False), peer)
    best = list(fastest.values())[:keep]
    candidates.remember_best(contest.folder / "best-peers.json", best)
    return best


def alternate(contest: Contest, peers: list[Peer], arguments: argparse.Namespace, began: float, mode: str) -> None:
    """Ours and the peers in turn, three times, or as often as the time allows."""
    round_s = 0.0
    for alternation in range(ALTERNATIONS):
        round_began = time.perf_counter()
        if alternation and not arguments.full and round_began - began + round_s > TIME_LIMIT_S:
            emit(BENCHMARK, stopped_after=alternation, reason=f"another alternation would pass {TIME_LIMIT_S:.0f} s")
            break
        steps = ALL_STEPS if arguments.full else TIMED_PAIR
        for own in dict.fromkeys([mode, "lean", "least"]):
            ours_steps = ALL_STEPS if alternation == 0 and own != "least" else steps
            contest.run_ours(own, arguments.precision, ours_steps, alternation=alternation)
        for peer in peers:
            contest.run_peer(peer, steps, alternation=alternation)
        if arguments.full:
            contest.run_ours(mode, arguments.precision, steps, DROPOUT, alternation=alternation)
            for peer in peers:
                contest.run_peer(replace(peer, dropout=DROPOUT), steps, alternation=alternation)
        round_s = time.perf_counter() - round_began
    if not arguments.full:
        contest.run_ours(mode, arguments.precision, TIMED_PAIR, DROPOUT)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare our LoRA training step with the peers' on this CPU")
    parser.add_argument("--shape", choices=workload.SHAPES, default="qwen2-0.5b", help="the model's shape")
    parser.add_argument("--full", action="store_true", help="search the peers' settings and train all steps; hours")
    parser.add_argument("--precision", choices=("auto", "bf16", "int16", "fp32"), default="auto", help="ours only")
    parser.add_argument("--threads", type=int, help="ours only; torch's own choice when left out")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "lorasmith-bench", help="kept files")
    try:
        return compare(parser.parse_args())
    except runner.WorkerFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def compare(arguments: argparse.Namespace) -> int:
    """Everything from the preparation to the closing lines; returns the exit status."""
    contest = Contest(arguments.shape, arguments.cache.expanduser().resolve(), arguments.threads)
    remembered = candidates.remembered_best(contest.folder / "best-peers.json")
    rivals = candidates.search_candidates() if arguments.full else (remembered or candidates.LIKELY_BEST[True])[:2]
    contest.prepare(list(dict.fromkeys(["lorasmith", "trl", *(peer.library for peer in rivals)])))
    references = reference_losses(contest)

    began = time.perf_counter()
    rate = measure_matrix_rate(contest.config, arguments.threads)
    native_bf16 = rate["bf16"]["step"] >= NATIVE_BF16 * rate["fp32"]["step"]
    if not native_bf16:
        emit(BENCHMARK, note="this CPU does not multiply bf16 natively; the bars were set on one with AVX-512 bf16")
    mode = own_choice(choose_precision(arguments.precision), contest.config)
    likely_best = (remembered or candidates.LIKELY_BEST[native_bf16])[:2]
    best = search_peers(contest, keep=4) if arguments.full else likely_best
    peers = [peer for peer in (candidates.TRL_DEFAULT, *best) if peer.fits(contest.config, available_bytes())]
    if not peers:
        print("error: no peer fits into this machine's memory", file=sys.stderr)
        return 1
    if candidates.TRL_DEFAULT not in peers:
        emit(BENCHMARK, not_judged="TRL's default", reason="its weights do not fit into memory")
    if references is None:
        emit(BENCHMARK, not_judged="losses", reason="TRL in float32 does not fit into memory")
    alternate(contest, peers, arguments, began, mode)
    emit(BENCHMARK, seconds=time.perf_counter() - began, mode=mode, shape=arguments.shape)
    return close(judge(contest.answers, peers, references, mode, rate, contest.config))


if __name__ == "__main__":
    sys.exit(main())
