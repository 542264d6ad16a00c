"""What an engine process asks of its libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lorasmith.engine.__main__ import FEWER_KERNELS

MULTIPLY = """
import ctypes, sys, torch
from lorasmith.engine.lora.frozen import PackedMatrix, PlainMatrix, can_pack
from lorasmith.engine.models.workspace import Workspace
class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Counts
dtype = getattr(torch, sys.argv[1])
weight, workspace = torch.randn(64, 64, dtype=dtype), Workspace(dtype)
matrices = [PlainMatrix(weight), *([PackedMatrix(weight)] if can_pack(dtype) else [])]
for tokens in range(1, 400):
    for matrix in matrices:
        matrix.forward(torch.ones(tokens, 64, dtype=dtype), None, workspace, "y")
    if tokens in (150, 399):
        print(mallinfo().uordblks)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_ever_other_lengths_leave_nothing_in_the_memory_of_an_engine(dtype: str) -> None:
    command = [sys.executable, "-c", MULTIPLY, dtype]
    ran = subprocess.run(command, env={**os.environ, **FEWER_KERNELS}, capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    assert after - before < 10e6  # 70 and 140 MB by default
