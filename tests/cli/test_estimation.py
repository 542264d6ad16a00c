"""`lorasmith estimate` from end to end: against a real run, without weights, and for what cannot be."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorasmith.errors import InvalidSpec
from lorasmith.python.memory import MemoryOptimizer, MemoryReading

Lorasmith = Callable[..., subprocess.CompletedProcess[str]]
RUN = ("--model", "starter", "--preset", "tiny", "--set", "training.memory=lean", "--set", "training.max_steps=4")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "counting.jsonl"
    lines = [
        {"instruction": f"Count from {n} to {n + n % 40}.", "output": ", ".join(map(str, range(n, n + n % 40 + 1)))}
        for n in range(160)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.mark.slow
def test_the_peak_of_a_run_is_predicted_within_a_tenth_and_nothing_remains(
    lorasmith: Lorasmith, rows: Path, tmp_path: Path
) -> None:
    said = lorasmith("estimate", *RUN, "--data", rows, "--measure-s", "1", "--json")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["fits"]
    assert found["computed_by"] == "packed decoder"
    assert not list((tmp_path / "home" / "previews").iterdir())
    ran = lorasmith("train", *RUN, "--data", rows, "--name", "counter")
    assert ran.returncode == 0, ran.stderr
    job = next((tmp_path / "home" / "jobs").iterdir())
    result = json.loads((job / "result.json").read_text())
    assert found["memory"]["peak_bytes"] == pytest.approx(result["peak_memory_bytes"], rel=0.10)
    assert found["trainable_parameters"] == result["trainable_parameters"]
    assert found["parameters"] + found["trainable_parameters"] == result["total_parameters"]
    assert found["steps"] == result["planned_steps"]
    assert found["time"]["total_s"] > 0
    adapter = sum(
        path.stat().st_size for path in (job / "adapter").glob("*") if path.suffix in (".safetensors", ".json")
    )
    assert found["disk"]["adapter_bytes"] == pytest.approx(adapter, rel=0.10)


@pytest.mark.slow
def test_the_peak_of_two_processes_together_is_predicted_within_a_tenth(
    lorasmith: Lorasmith, rows: Path, tmp_path: Path
) -> None:
    two = (*RUN, "--set", "training.processes=2", "--data", rows)
    said = lorasmith("estimate", *two, "--measure-s", "2", "--json")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    memory = found["memory"]
    assert found["processes"] == len(memory["process_peaks_bytes"]) == 2
    assert memory["peak_bytes"] == sum(memory["process_peaks_bytes"])
    assert not list((tmp_path / "home" / "previews").iterdir())
    alone = next(one for one in found["suggestions"] if one["assignments"] == ["training.processes=1"])
    assert alone["peak_memory_bytes"] < 0.7 * memory["peak_bytes"]
    assert alone["total_s"] > 0
    ran = lorasmith("train", *two, "--name", "counter")
    assert ran.returncode == 0, ran.stderr
    job = next((tmp_path / "home" / "jobs").iterdir())
    result = json.loads((job / "result.json").read_text())
    assert memory["peak_bytes"] == pytest.approx(result["peak_memory_bytes"], rel=0.10)
    assert found["time"]["exchange_s"] > 0
    assert found["steps"] == result["planned_steps"]


@pytest.mark.slow
def test_the_peak_of_a_run_on_a_quantised_base_is_predicted_within_a_tenth(
    lorasmith: Lorasmith, rows: Path, starter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "wide"
    shutil.copytree(starter, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "head_dim": 64}
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, **sizes, num_attention_heads=12, num_key_value_heads=12)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    weights = 6 * (4 * 768 * 768 + 3 * 768 * 3072)
    run = ("--model", folder, *RUN[2:-1], "training.max_steps=2", "--data", rows)
    settings = ("training.quantization=nf4", "training.precision=fp32", "training.micro_batch_tokens=1024")
    quantized = (*run, *(word for setting in settings for word in ("--set", setting)))
    said = lorasmith("estimate", *quantized, "--measure-s", "1", "--json")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert lorasmith("train", *quantized, "--name", "counter").returncode == 0
    job = next((tmp_path / "home" / "jobs").iterdir())
    result = json.loads((job / "result.json").read_text())
    assert 4 * weights > 0.15 * result["peak_memory_bytes"]  # with the full base the bound would not hold
    assert found["memory"]["peak_bytes"] == pytest.approx(result["peak_memory_bytes"], rel=0.10)
    assert found["parameters"] + found["trainable_parameters"] == result["total_parameters"]


@pytest.mark.slow  # two estimates of a minute each
def test_a_model_that_cannot_fit_is_estimated_from_its_config_alone(
    lorasmith: Lorasmith, rows: Path, starter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "huge"
    shutil.copytree(starter, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    # 400 B parameters: no machine of these tests holds two of its layers to measure
    config |= {"hidden_size": 32_768, "intermediate_size": 131_072, "num_hidden_layers": 24, "head_dim": 128}
    config |= {"num_attention_heads": 256, "num_key_value_heads": 32}
    (folder / "config.json").write_text(json.dumps(config))
    said = lorasmith("estimate", "--model", folder, "--data", rows, "--measure-s", "1", "--json")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert not found["fits"]
    assert "it needs" in found["why_not"]
    assert "a smaller model" in found["way_out"]
    assert found["memory"]["weights_bytes"] > 2 * 3e11  # which stay in 16 bits
    assert found["time"] is None
    assert "are free for measuring" in found["why_no_time"]
    table = lorasmith("estimate", "--model", folder, "--data", rows, "--measure-s", "1")
    assert table.returncode == 0
    assert "It does not fit" in table.stdout


def test_training_still_refuses_a_folder_without_weights(
    lorasmith: Lorasmith, rows: Path, starter: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(starter, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    refused = lorasmith("train", "--model", folder, "--data", rows)
    assert refused.returncode == 1
    assert "holds no weights" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("--model", "startr", "--data", "signatures"), 3, "no model 'startr'; did you mean 'starter'?"),
        (
            ("--model", "starter", "--data", "signatres"),
            3,
            "no dataset and no file 'signatres'; did you mean 'signatures'?",
        ),
        (("--model", "starter"), 2, "data is missing"),
        (("--model", "starter", "--data", "signatures", "--measure-s", "90"), 2, "at most 60 seconds, got 90"),
        (("--model", "starter", "--data", "signatures", "--set", "lora.rnk=8"), 2, "did you mean 'lora.rank'?"),
    ],
)
def test_bad_input_is_named(lorasmith: Lorasmith, arguments: tuple[str, ...], status: int, sentence: str) -> None:
    refused = lorasmith("estimate", *arguments)
    assert refused.returncode == status
    assert sentence in " ".join(refused.stderr.split())


def test_what_the_run_would_refuse_is_refused_without_a_trace(lorasmith: Lorasmith, rows: Path, tmp_path: Path) -> None:
    refused = lorasmith(
        "estimate", "--model", "starter", "--data", rows, "--set", "lora.target_modules=[w_proj]", "--measure-s", "1"
    )
    assert refused.returncode == 2
    assert "matches no linear layer" in refused.stderr
    assert not list((tmp_path / "home" / "previews").iterdir())


GUIDE = """
from lorasmith.python.memory import MemoryOptimizer
optimizer = MemoryOptimizer(target_gpu_memory_gb=7.5)
with optimizer.memory_monitor("Training") as reading:
    block = bytearray(200_000_000)
    block[::4096] = b"x" * len(block[::4096])
print(reading.peak_bytes - reading.start_bytes)
print(*optimizer.suggest_optimizations())
"""


def test_the_snippet_of_the_model_factory_guide_runs() -> None:
    # In a process of its own: what other tests left behind could be freed while the block is watched.
    ran = subprocess.run([sys.executable, "-c", GUIDE], capture_output=True, text=True, timeout=60, check=True)
    grown, sentence = ran.stdout.splitlines()  # one sentence: no run was named to suggest changes of
    assert int(grown) > 150_000_000
    assert sentence.startswith("Training: ")
    assert "the target is 7.50 GB" in sentence


def test_blocks_that_keep_memory_are_named() -> None:
    optimizer = MemoryOptimizer(1.0)
    optimizer.readings = [MemoryReading("load", 0, 10**9, 10**8 * n) for n in (2, 3, 4, 5)]
    assert "load: 3 repeats kept 300 MB: something grows" in optimizer.suggest_optimizations()


def test_a_target_is_above_zero_and_a_run_has_a_model_and_data() -> None:
    with pytest.raises(InvalidSpec, match="must be above 0, got 0"):
        MemoryOptimizer(0)
    with pytest.raises(InvalidSpec, match="give model and data"):
        MemoryOptimizer(7.5, model="starter")
