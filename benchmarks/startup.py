"""How long `lorasmith --help` and `import lorasmith` take, beside `import torch`, which neither may need.

python benchmarks/startup.py: alternating processes, JSON lines, one closing line per claim, exit 1 when short.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

BAR_S = 0.5
REPEATS = 9
PEER = "import torch"
CLAIMS = {"lorasmith --help": ["-m", "lorasmith", "--help"], "import lorasmith": ["-c", "import lorasmith"]}


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> int:
    commands = {**CLAIMS, PEER: ["-c", PEER]}
    for arguments in commands.values():
        seconds(arguments)  # fills the page cache and writes the bytecode
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for repeat in range(REPEATS):
        for name, arguments in commands.items():
            taken[name].append(seconds(arguments))
            print(json.dumps({"benchmark": "startup", "command": name, "repeat": repeat, "seconds": taken[name][-1]}))
    peer = statistics.median(taken[PEER])
    short = False
    for name in CLAIMS:
        ours = statistics.median(taken[name])
        short |= ours > BAR_S
        verdict = "short" if ours > BAR_S else "ok"
        print(f"{name}: ours {ours:.3f} s peer {peer:.3f} s ratio {ours / peer:.2f} bar {BAR_S} s {verdict}")
    return int(short)


if __name__ == "__main__":
    sys.exit(main())
