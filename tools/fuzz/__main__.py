"""`python -m tools.fuzz [--seconds 600] [--target NAME] [--input FILE]`: each target in turn, in a process of its own.

atheris (https://github.com/google/atheris) mutates inputs and keeps those that reach new code. What it kept lies in
`.fuzz/corpus`, so that a later run goes on from there; an input that breaks something is written to `.fuzz/findings`, and
`--target NAME --input FILE` runs it again with its traceback. The status is 1 where something broke.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from lorasmith.services.data_formats import SHAPES
from tools.fuzz.seeds import seeds_of
from tools.fuzz.targets import TARGETS

FOLDER = Path(__file__).parents[2] / ".fuzz"
INPUT_BYTES = 4096
INPUT_SECONDS = 20  # for one input; a slower one is a finding
MEMORY_MIB = 2048
MEMORY = Path("/dev/shm")  # files of a moment need no disk
OTHER_WORDS = (
    *("role", "content", "from", "value", "weight", "tool_calls", "tool_call_id", "function_call", "function", "name"),
    *("arguments", "parameters", "description", "group", "split", "user", "assistant", "human", "gpt", "observation"),
    *("train", "val", "test"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--target", choices=TARGETS, action="append", help="this one alone")
    parser.add_argument("--input", type=Path, help="run this file instead of new ones")
    arguments = parser.parse_args()
    targets = arguments.target or list(TARGETS)
    if arguments.input is not None:
        for target in targets:
            with tempfile.TemporaryDirectory() as folder:
                TARGETS[target](arguments.input.read_bytes(), Path(folder))
        return 0
    broke = [target for target in targets if not fuzz(target, max(1, arguments.seconds // len(targets)))]
    for target in broke:
        print(f"{target} broke: the inputs are in {FOLDER / 'findings' / target}", file=sys.stderr)
    return int(bool(broke))


def fuzz(target: str, seconds: int) -> bool:
    """Whether nothing broke."""
    corpus, findings = FOLDER / "corpus" / target, FOLDER / "findings" / target
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    for seed in seeds_of(target):
        (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
    begun, log = len(list(corpus.iterdir())), FOLDER / f"{target}.log"
    print(f"{target}: {seconds} s from {begun} inputs", flush=True)
    with log.open("w") as output, tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        command = [
            *(sys.executable, "-m", "tools.fuzz.run", target, folder, str(corpus)),
            *(f"-max_total_time={seconds}", f"-timeout={INPUT_SECONDS}", f"-rss_limit_mb={MEMORY_MIB}"),
            *(f"-max_len={INPUT_BYTES}", f"-artifact_prefix={findings}/", f"-dict={written_words()}"),
            *("-print_final_stats=1", "-verbosity=0"),
        ]
        whole = subprocess.run(command, check=False, stdout=output, stderr=subprocess.STDOUT).returncode == 0
    said = log.read_text(errors="replace")
    if whole:
        statistics = dict(re.findall(r"stat::(\w+):\s+(\d+)", said))
        kept = len(list(corpus.iterdir())) - begun
        print(f"  {statistics['number_of_executed_units']} inputs, of which {kept} reached something new", flush=True)
    else:
        print(said[-3000:], file=sys.stderr, flush=True)
    return whole


def written_words() -> Path:
    """libFuzzer's dictionary: names of fields and roles, and the signs of JSON and CSV."""
    fields = {name for shape in SHAPES for name in (*shape.required, *shape.optional)} | set(OTHER_WORDS)
    words = [
        *(f'\\"{name}\\"' for name in sorted(fields)),
        *("\\xef\\xbb\\xbf", "\\\\ud800", "sep=;\\x0a", "null", "NaN", "true"),
    ]
    path = FOLDER / "words.txt"
    path.write_text("".join(f'"{word}"\n' for word in words), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
