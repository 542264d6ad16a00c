"""Files larger than the memory that an import may take: minutes, or for the largest an hour."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

LARGE_GB = float(os.environ.get("LORASMITH_LARGE_IMPORT_GB", "5"))
LARGE_PEAK_KB = 1024 * 1024  # 1 GiB
TIMEOUT_S = 4 * 3600
IMPORT = """
import re, sys
from pathlib import Path
from lorasmith.errors import LorasmithError
from lorasmith.schemas.data import DataImportSpec
from lorasmith.services.data_import import import_dataset
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
try:
    dataset = import_dataset(Workbench.open(Settings(home=Path(sys.argv[2]))), Path(sys.argv[1]), DataImportSpec(name="big"))
    print(dataset.fates)
except LorasmithError as error:
    print(error.message)
print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
"""


def run_import(path: Path, home: Path, stop: Callable[[], bool] | None = None) -> tuple[str, int]:
    """What an import in a process of its own says, and its peak resident memory in kB; Ctrl-C as soon as `stop` says so.

    `VmHWM` of proc(5) begins with the process; `ru_maxrss` would begin with that of the process that started it.
    """
    command = [sys.executable, "-c", IMPORT, str(path), str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while stop is not None and process.poll() is None:
            if stop():
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.2)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    *said, peak = output.splitlines()
    return "\n".join(said), int(peak)


@pytest.mark.slow
def test_a_line_of_a_gigabyte_is_refused_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "line.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(1024):
            file.write(b"a" * 1024 * 1024)
        file.write(b'"}\n')
    said, peak = run_import(path, tmp_path / "home")
    assert "found a line of more than 16777216 bytes" in said
    assert peak < 300_000


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_large_file_is_imported_in_bounded_memory(tmp_path: Path, name: str) -> None:
    path, num_rows = tmp_path / name, 300_000  # 280 MB; 300,000 rows held in memory would take more than twice that
    filler = "The quick brown fox jumps over the lazy dog. " * 20
    with path.open("w", encoding="utf-8") as file:
        file.write({"rows.jsonl": "", "rows.json": "[\n", "rows.csv": "input,output\n"}[name])
        for number in range(num_rows):
            if name == "rows.csv":
                file.write(f"Question {number},{filler}\n")
            else:
                comma = "," if name == "rows.json" and number < num_rows - 1 else ""
                file.write(f'{{"input": "Question {number}", "output": "{filler}"}}{comma}\n')
        file.write("]" if name == "rows.json" else "")
    said, peak = run_import(path, tmp_path / "home")
    assert f"'kept'>: {num_rows}" in said
    assert peak < 300_000, f"{peak} kB"


@pytest.mark.slow
def test_five_gigabytes_take_a_gibibyte_and_an_import_that_was_stopped_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """LORASMITH_LARGE_IMPORT_GB chooses another size. The disk must hold five times as much."""
    path, homes = tmp_path / "rows.jsonl", [tmp_path / "whole", tmp_path / "parted"]
    filler = "The quick brown fox jumps over the lazy dog. " * 80  # 3.6 kB
    num_rows = 0
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < LARGE_GB * 1e9 if num_rows % 1000 == 0 else True:
            file.write(f'{{"input": "Question {num_rows % 997}: {num_rows}", "output": "{filler}"}}\n')
            num_rows += 1
    said, peak = run_import(path, homes[0])
    assert f"'kept'>: {num_rows}" in said
    assert peak < LARGE_PEAK_KB, f"{peak} kB"
    whole = digests(homes[0])
    shutil.rmtree(homes[0])

    def third_is_read() -> bool:
        rows = homes[1] / "datasets" / ".staging-import-big" / "rows.jsonl"
        return rows.exists() and rows.stat().st_size > path.stat().st_size / 3

    said, peak = run_import(path, homes[1], stop=third_is_read)
    assert said == "stopped; no dataset 'big' was made"
    assert not list(homes[1].glob("datasets/dataset_*"))
    said, again = run_import(path, homes[1])
    assert f"'kept'>: {num_rows}" in said
    assert max(peak, again) < LARGE_PEAK_KB, f"{max(peak, again)} kB"
    assert digests(homes[1]) == whole
    for place in (*homes, path):  # pytest keeps the folders of three runs
        shutil.rmtree(place, ignore_errors=True) if place.is_dir() else place.unlink(missing_ok=True)


def digests(home: Path) -> dict[str, str]:
    """Of the rows and the ledger of the only dataset."""
    (folder,) = home.glob("datasets/dataset_*")
    result = {}
    for file in folder.glob("*.jsonl"):
        with file.open("rb") as stream:
            result[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    assert len(result) == 4
    return result
