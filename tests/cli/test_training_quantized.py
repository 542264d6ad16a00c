"""A quantised base from the command line to a merged folder."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.slow
def test_an_adapter_trained_on_an_nf4_base_is_merged_into_the_full_one(
    lorasmith: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run = ("--model", "starter", "--data", "signatures", "--preset", "tiny", "--set", "training.max_steps=2")
    trained = lorasmith("train", *run, "--name", "small", "--set", "training.quantization=nf4", "--json")
    assert trained.returncode == 0, trained.stderr
    assert "2,949,120 weights of the base are in 4.13 bits, 2 MB instead of 12 MB" in " ".join(trained.stderr.split())
    folder = tmp_path / "home" / json.loads(trained.stdout)["folder"]
    passport = json.loads((folder / "passport.json").read_text(encoding="utf-8"))
    assert passport["base_quantization"] == {"quantization": "nf4", "double_quantization": True}

    merged = lorasmith("export", "merged", "small", "--output", tmp_path / "merged")  # proves its logits first
    assert merged.returncode == 0, merged.stderr
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
