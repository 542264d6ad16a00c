"""LLaMA-Factory's supervised fine-tuning, as a worker: settings and answer are described in protocol.py."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import protocol

# isort: split

os.environ["DISABLE_VERSION_CHECK"] = "1"  # it demands torchaudio and torchvision, which only media need

# isort: split

import no_torchaudio  # noqa: F401  # before llamafactory

# isort: split

import inputs
import sft
import torch
from datasets import Dataset, DatasetDict
from llamafactory.train.sft import workflow
from llamafactory.train.tuner import run_exp


def check_settings(settings: protocol.Settings) -> None:
    """Refuse what it cannot do with rows that are already token ids."""
    if settings["batching"] != "fixed":
        raise ValueError(
            f"LLaMA-Factory packs while it tokenizes: batching must be fixed, got {settings['batching']!r}"
        )


def model_in_dtype(settings: protocol.Settings, folder: Path) -> str:
    """The model behind a config.json with the wanted dtype: it loads weights in the dtype of that file, whatever is said."""
    if settings["precision"] in ("default", "bf16-weights"):
        return settings["model"]
    named = folder / "model"
    named.mkdir()
    for path in Path(settings["model"]).iterdir():
        (named / path.name).symlink_to(path)
    config = json.loads((named / "config.json").read_text(encoding="utf-8"))
    (named / "config.json").unlink()
    (named / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    return str(named)


def run_settings(settings: protocol.Settings, folder: Path) -> dict[str, Any]:
    """What would stand in the file for `llamafactory-cli train`."""
    micro_batch_rows = settings["micro_batch_rows"] or settings["rows_per_step"]
    checkpointing = settings["gradient_checkpointing"]
    arguments = {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": model_in_dtype(settings, folder),
        "adapter_name_or_path": inputs.adapter_with_dropout(settings, folder),
        "finetuning_type": "lora",
        "template": "empty",
        "dataset": "rows",  # must be said, is not read
        "tokenized_path": str(folder / "rows"),
        "disable_shuffling": True,
        "output_dir": str(folder / "output"),
        "use_cpu": True,
        "max_steps": len(settings["steps"]),
        "per_device_train_batch_size": micro_batch_rows,
        "gradient_accumulation_steps": settings["rows_per_step"] // micro_batch_rows,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "seed": settings["seed"],
        "torch_compile": settings["compile"],
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if settings["precision"] != "default":
        arguments["bf16"] = settings["precision"] != "fp32"
    if checkpointing is not None:
        arguments["disable_gradient_checkpointing"] = not checkpointing  # recomputes unless told not to
    return arguments


def main() -> None:
    settings, answers = protocol.begin()
    check_settings(settings)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    trainers = []
    clock = sft.TrainerClock()

    class Trainer(sft.measured_trainer(workflow.CustomSeq2SeqTrainer)):
        def __init__(self, **parts: Any) -> None:
            super().__init__(**parts)
            self.clock = clock
            trainers.append(self)

    workflow.CustomSeq2SeqTrainer = Trainer
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = Dataset.from_list(inputs.labelled_rows(settings))
        DatasetDict({"train": rows}).save_to_disk(folder / "rows")  # the form of one that it has tokenized itself
        run_exp(run_settings(settings, folder), callbacks=[clock])
    trained = sft.trained_answer(trainers[0], protocol.read_rows(settings))
    trained["resolved"]["gradient_checkpointing"] = trainers[0].model.is_gradient_checkpointing
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "llamafactory")}
    protocol.answer(answers, {"library": "llamafactory", "versions": versions, **trained})


if __name__ == "__main__":
    main()
