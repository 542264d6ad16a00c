"""The duplicate search over a million rows, end to end, beside datasketch and rensa with the same exact comparison.

python benchmarks/dedup.py: JSON lines, one closing line per claim, exit 1 when short. `--rows 100000` for a short run,
`--from DIR` to recombine texts of your own. Every run is a process of its own, from the JSONL file to the ledger on
disk. Peers run on the first rows of the same file (`--peer-rows`) and their time is scaled linearly; they run in one
process, as their interfaces do, ours in as many as there are cores. The bars hold for wall time and for CPU time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from dedup_corpus import Planted, read_rows, shingle_set, write_corpus
from dedup_peers import PEERS, search
from report import Bar, close, emit
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from lorasmith.services.data_duplicates.index import write_index
from lorasmith.services.data_duplicates.search import decide
from lorasmith.services.data_duplicates.texts import Row, folded

NAME = "dedup"
THRESHOLD = 0.8
SEED = 20
DATASKETCH_BAR, RENSA_BAR, MEMORY_BAR_GIB, RECALL_BAR = 5.0, 1.0, 3.0, 0.99
GIB = 1 << 30
BRUTE_FORCE_ROWS = 20_000
ROWS_OF_A_BLOCK = 500
SAMPLE_S = 0.2


def search_ours(corpus: Path, ledger: Path, folder: Path) -> int:
    rows = (Row(line, f"{instruction}\n{output}") for line, instruction, output in read_rows(corpus))
    decision = decide(write_index(rows, folder), THRESHOLD)
    with ledger.open("w", encoding="utf-8") as file:
        for finding in decision.findings():
            record: dict[str, object] = {"row": finding.id, "kind": finding.kind}
            if finding.of is not None:
                record |= {"of": finding.of, "similarity": finding.similarity}
            file.write(json.dumps(record) + "\n")
    return decision.summary().kept


def work(who: str, corpus: Path, ledger: Path) -> None:
    """One search in this process; its numbers as one JSON line."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=ledger.parent) as folder:
        if who == "ours":
            kept = search_ours(corpus, ledger, Path(folder) / "index")
        else:
            kept = search(who, corpus, ledger, THRESHOLD)
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "kept": kept}))


def measured(who: str, corpus: Path, ledger: Path, rows: int) -> dict[str, Any]:
    """Run in a process, with the peak of the memory of it and its children (proportional set size, sampled)."""
    command = [sys.executable, __file__, "--work", who, str(corpus), str(ledger)]
    peak = cpu = 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            taken, spent = usage(tree)
            peak, cpu = max(peak, taken), max(cpu, spent)
            time.sleep(SAMPLE_S)
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{who} ended with {process.returncode}")
    answer: dict[str, Any] = {**json.loads(output), "peak_gib": round(peak / GIB, 3), "cpu_seconds": round(cpu, 2)}
    emit(NAME, who=who, rows=rows, **answer, microseconds_per_row=round(answer["seconds"] / rows * 1e6, 1))
    return answer


def usage(tree: psutil.Process) -> tuple[float, float]:
    """Bytes of the tree, and CPU seconds: of its living members and of the children that have ended."""
    taken = cpu = 0.0
    try:
        for process in [tree, *tree.children(recursive=True)]:
            times = process.cpu_times()
            taken += process.memory_full_info().pss
            cpu += times.user + times.system
            if process == tree:
                cpu += times.children_user + times.children_system
    except psutil.Error:
        return 0.0, 0.0  # a process ended meanwhile; the next sample has it
    return taken, cpu


def first_rows(corpus: Path, rows: int) -> Path:
    path = corpus.with_name(f"first-{rows}.jsonl")
    with corpus.open(encoding="utf-8") as source, path.open("w", encoding="utf-8") as file:
        file.writelines(itertools.islice(source, rows))
    return path


def stand_ins(ledger: Path) -> list[int]:
    with ledger.open(encoding="utf-8") as file:
        return [(record := json.loads(line)).get("of", record["row"]) for line in file]


def recall_by_band(planted: list[Planted], ledger: Path) -> float:
    """Share of the planted pairs that ended in one cluster, by similarity; returned for those at the threshold."""
    of = stand_ins(ledger)
    bands: dict[int, list[bool]] = {}
    for pair in planted:
        bands.setdefault(min(int(pair.similarity * 20 + 1e-9), 20), []).append(of[pair.left] == of[pair.right])
    for band in sorted(bands):
        share = sum(bands[band]) / len(bands[band])
        emit(NAME, measure="joined", similarity_from=band / 20, pairs=len(bands[band]), share=round(share, 5))
    at_threshold = [of[pair.left] == of[pair.right] for pair in planted if pair.similarity >= THRESHOLD]
    return sum(at_threshold) / len(at_threshold)


def against_brute_force(corpus: Path, folder: Path) -> tuple[float, float]:
    """(precision, recall) over all pairs of the first 20,000 rows: of rows in one cluster, and of true pairs.

    Every pair is compared: a sparse matrix of rows by shingles (strings, numbered) times itself counts what two rows
    share. A joined row counts as right when chains of pairs at or above the threshold connect it with its stand-in.
    """
    texts = [
        folded(f"{instruction}\n{output}")
        for _, instruction, output in itertools.islice(read_rows(corpus), BRUTE_FORCE_ROWS)
    ]
    numbers: dict[tuple[str, ...], int] = {}
    rows = [[numbers.setdefault(shingle, len(numbers)) for shingle in shingle_set(text)] for text in texts]
    sizes = np.array([len(row) for row in rows])
    ends = np.append(0, np.cumsum(sizes))
    ones = np.ones(ends[-1], np.float32)
    matrix = csr_array((ones, np.fromiter(itertools.chain(*rows), np.int64), ends), (len(rows), len(numbers)))
    lefts, rights = [], []
    for first in range(0, len(rows), ROWS_OF_A_BLOCK):
        block = slice(first, first + ROWS_OF_A_BLOCK)
        shared = (matrix[block] @ matrix.T).toarray()  # (rows of the block, all rows)
        similarity = shared / (sizes[block, None] + sizes[None] - shared)
        left, right = np.nonzero(similarity >= THRESHOLD - 1e-6)  # float32; settled exactly below
        exact = shared[left, right].astype(np.int64)
        left = left + first
        true = (exact / (sizes[left] + sizes[right] - exact) >= THRESHOLD) & (left < right)
        lefts.append(left[true])
        rights.append(right[true])
    left, right = np.concatenate(lefts), np.concatenate(rights)
    links = csr_array((np.ones(len(left)), (left, right)), (len(rows), len(rows)))
    _, component = connected_components(links, directed=False)
    index = write_index((Row(line, text) for line, text in enumerate(texts)), folder / "brute-force")
    of = decide(index, THRESHOLD).of
    joined = np.flatnonzero(of != np.arange(len(of)))
    right_ones = int((component[joined] == component[of[joined]]).sum())
    found = int((of[left] == of[right]).sum())
    emit(NAME, measure="brute force", rows=len(of), pairs=len(left), found=found, joined=len(joined), right=right_ones)
    return right_ones / len(joined), found / len(left)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--peer-rows", type=int, default=50_000)
    parser.add_argument("--alternations", type=int, default=3, help="ours and the peers by turns on the peers' rows")
    parser.add_argument(
        "--from", dest="source", type=Path, help="folder of texts to recombine (default: the starter's)"
    )
    parser.add_argument("--work", nargs=3, metavar=("WHO", "CORPUS", "LEDGER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        who, corpus, ledger = arguments.work
        work(who, Path(corpus), Path(ledger))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        return compare(Path(temporary), arguments)


def compare(folder: Path, arguments: argparse.Namespace) -> int:
    rows, peer_rows = arguments.rows, min(arguments.peer_rows, arguments.rows)
    corpus, ledger = folder / "rows.jsonl", folder / "ledger.jsonl"
    planted = write_corpus(corpus, rows, SEED, arguments.source)
    emit(NAME, measure="corpus", rows=rows, planted=len(planted), bytes=corpus.stat().st_size)
    runs: dict[str, list[dict[str, Any]]] = {who: [] for who in ("ours", *PEERS)}
    share = first_rows(corpus, peer_rows)
    for _ in range(arguments.alternations):
        for who in runs:
            runs[who].append(measured(who, share, ledger, peer_rows))
    growth = [size for size in (10_000, 100_000) if size < rows]
    for size in growth:
        measured("ours", first_rows(corpus, size), ledger, size)
    whole = measured("ours", corpus, ledger, rows)
    recall = recall_by_band(planted, ledger)
    precision, brute_recall = against_brute_force(corpus, folder)
    bars = []
    for peer, bar in (("datasketch", DATASKETCH_BAR), ("rensa", RENSA_BAR)):
        for clock, unit in (("seconds", "s"), ("cpu_seconds", "CPU s")):
            scaled = statistics.median(run[clock] for run in runs[peer]) * rows / peer_rows
            text = f"{scaled:.0f} {unit} (scaled from {peer_rows} rows)"
            ratio = scaled / whole[clock]
            bars.append(Bar(f"{rows} rows beside {peer}", f"{whole[clock]:.0f} {unit}", text, ratio, bar))
    memory = whole["peak_gib"]
    bars += [
        Bar("peak memory in GiB", f"{memory:.2f}", "limit 3", memory, MEMORY_BAR_GIB, at_least=False),
        Bar("recall of planted pairs at 0.8", f"{recall:.4f}", "truth 1", recall, RECALL_BAR),
        Bar(
            f"recall beside brute force on {BRUTE_FORCE_ROWS} rows",
            f"{brute_recall:.4f}",
            "truth 1",
            brute_recall,
            RECALL_BAR,
        ),
        Bar("precision beside brute force", f"{precision:.4f}", "truth 1", precision, 1.0),
    ]
    return close(bars)


if __name__ == "__main__":
    sys.exit(main())
