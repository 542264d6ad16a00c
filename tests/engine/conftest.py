"""Tiny causal LMs built from a config with the starter's tokenizer, training jobs on them and their shapes, and a teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from lorasmith.engine.training.estimation.run import read_material
from lorasmith.engine.training.estimation.shape import Material, RunShape, shape_run
from lorasmith.schemas.estimation import EstimateInputs
from lorasmith.schemas.training import TrainingSpec
from tests.engine.small_jobs import counting_examples, write_examples
from tests.teacher_stub import Stub, serving

Shaped = Callable[..., RunShape]


@pytest.fixture(scope="session")
def tokenizer(starter: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(starter)
    return loaded


@pytest.fixture(scope="session")
def qwen2_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Random weights: 2 layers, grouped-query attention, biases on q, k and v."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("qwen2")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bf16_folder(
    tmp_path_factory: pytest.TempPathFactory, qwen2_folder: Path, tokenizer: PreTrainedTokenizerBase
) -> Path:
    """The tiny Qwen2 in 16 bits."""
    folder = tmp_path_factory.mktemp("bf16")
    AutoModelForCausalLM.from_pretrained(qwen2_folder, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def training_job(tmp_path: Path) -> Callable[..., Path]:
    """Write a training job folder on a model folder; keyword arguments go into `training`, `lora` replaces the adapter."""

    def make(model_folder: Path, name: str = "job", *, lora: dict[str, Any] | None = None, **training: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        train = write_examples(tmp_path / "train.jsonl", counting_examples(24))
        val = write_examples(tmp_path / "val.jsonl", counting_examples(4, first=100))
        settings = {
            "learning_rate": 1e-2,
            "batch_size": 4,
            "gradient_accumulation_steps": 1,
            "num_epochs": 2,
            "device": "cpu",
            "precision": "fp32",
            "memory": "lean",  # two jobs that measure may choose differently
            "log_every": 1,
            "save_every": 4,
            "max_seq_length": 128,
            **training,
        }
        order = {
            "id": f"job_{name}",
            "kind": "training",
            "spec": {
                "model": "tiny",
                "data": "counting",
                "lora": lora or {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": "all"},
                "training": settings,
            },
            "inputs": {
                "model_name": str(model_folder),
                "model_folder": str(model_folder),
                "dataset_id": "dataset_1",
                "dataset_name": "counting",
                "dataset_sha256": "0" * 64,
                "train_file": str(train),
                "val_file": str(val),
                "adapter_name": name,
            },
        }
        (folder / "job.json").write_text(json.dumps(order), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def material(training_job: Callable[..., Path], qwen2_folder: Path) -> Callable[..., tuple[TrainingSpec, Material]]:
    """What an estimate reads of a training job on that base; keyword arguments as for `training_job`."""

    def make(base: Path = qwen2_folder, **settings: Any) -> tuple[TrainingSpec, Material]:
        folder = training_job(base, f"run-{len(settings)}", **settings)
        order = json.loads((folder / "job.json").read_text())
        spec = TrainingSpec.model_validate(order["spec"])
        files = {name: order["inputs"][name] for name in ("train_file", "val_file", "model_name", "dataset_name")}
        inputs = EstimateInputs(**files, model_folder=str(base), disk_folder=str(folder))
        return spec, read_material(spec, inputs)

    return make


@pytest.fixture
def shaped(material: Callable[..., tuple[TrainingSpec, Material]]) -> Shaped:
    def make(**settings: Any) -> RunShape:
        spec, found = material(**settings)
        return shape_run(found, spec)

    return make


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(Stub()) as started:
        yield started
