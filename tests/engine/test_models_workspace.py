"""Buffers that grow from step to step: what they hold is what they are."""

from __future__ import annotations

import subprocess
import sys

GROWING = """
import re, torch
from pathlib import Path
from lorasmith.engine.models.workspace import Workspace, retain_heap

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

retain_heap()
workspace, before = Workspace(torch.float32), resident()
for tokens in (1_000, 1_500, 2_300, 3_400, 5_000):
    for layer in range(4):
        workspace.take(f"x.{layer}", tokens, 1_024).fill_(1)
print(workspace.size_bytes, resident() - before)
workspace.clear()
print(0, resident() - before)
"""


def test_a_buffer_that_grows_leaves_nothing_of_its_smaller_selves() -> None:
    """In a process of its own, with a heap that keeps what is freed."""
    ran = subprocess.run([sys.executable, "-c", GROWING], capture_output=True, text=True, timeout=120, check=True)
    full, cleared = ([int(word) for word in line.split()] for line in ran.stdout.splitlines())
    assert full[0] == 4 * 5_000 * 1_024 * 4
    assert full[1] < full[0] + 8e6
    assert cleared[1] < 8e6
