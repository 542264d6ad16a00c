"""What an engine process loads before it begins."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

LOADED = """
import importlib, sys
import torch
from lorasmith.engine.__main__ import STAGES
from lorasmith.engine.optional_imports import hide_bitsandbytes
hide_bitsandbytes()
for stage in STAGES.values():
    importlib.import_module(stage)
from peft.import_utils import is_bnb_available  # asked when LoRA layers are made
print(is_bnb_available(), "torch._inductor.compile_fx" in sys.modules)
from lorasmith.engine.training.optimizers import build_optimizer
print(build_optimizer("adamw_8bit", {"a": torch.nn.Parameter(torch.zeros(2, 2))}, rate=1e-3, weight_decay=0.0))
"""


FURTHER = """
import runpy, sys
from contextlib import suppress
from lorasmith.errors import LorasmithError
sys.argv = ["peer", "no-such-folder", "1", "2"]
with suppress(LorasmithError):
    runpy.run_module("lorasmith.engine.training.peer", run_name="__main__")
print(sys.modules["bitsandbytes"], "torch" in sys.modules)
"""


def test_a_further_process_of_a_job_hides_bitsandbytes_before_it_loads_anything() -> None:
    ran = subprocess.run([sys.executable, "-c", FURTHER], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "None False\n"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_bitsandbytes_and_the_compiler_are_loaded_for_the_optimizer_alone() -> None:
    ran = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.startswith("False False\nAdamW8bit")
