"""What an engine process loads before it begins."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

LOADED = """
import sys
from lorasmith.engine.__main__ import STAGES, import_stage
from lorasmith.schemas.jobs import JobKind
stages = [import_stage(kind) for kind in STAGES]
print(len(stages), "bitsandbytes" in sys.modules, "torch._inductor.compile_fx" in sys.modules)
from bitsandbytes.optim.adamw import AdamW8bit
"""


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_no_stage_loads_bitsandbytes_or_the_compiler_and_the_optimizer_can() -> None:
    ran = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.split() == ["8", "False", "False"]
