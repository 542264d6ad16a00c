"""Axolotl's trainer, as a worker: settings and answer are described in protocol.py."""

from __future__ import annotations

import json
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import protocol

# isort: split

os.environ |= {"AXOLOTL_DO_NOT_TRACK": "1", "ACCELERATE_USE_CPU": "1"}  # read at import

# isort: split

import inputs
import sft
import torch
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import execute_training, setup_model_and_trainer
from axolotl.utils.dict import DictDefault
from steps import StepRecord


def check_settings(settings: protocol.Settings) -> None:
    """Refuse what it does not do without a GPU."""
    if settings["batching"] != "fixed":
        raise ValueError(f"Axolotl without FlashAttention pads rows in file order, got {settings['batching']!r}")
    if settings["precision"] != "fp32":  # it has no option for use_cpu, without which transformers refuses bf16
        raise ValueError(f"Axolotl trains in fp32 on a CPU, got precision {settings['precision']!r}")


def weigh_by_tokens(records: list[StepRecord], rows: list[dict[str, list[int]]]) -> None:
    """The losses as shares of the step's mean over tokens: of several micro-batches it trains the mean of their means."""
    finder = protocol.RowFinder(rows)
    for record in records:
        found = [finder.rows_in(batch.tolist()) for batch in record.batches]
        labelled = [sum(sum(rows[row]["completion_mask"]) for row in in_batch) for in_batch in found]
        record.losses = [loss * len(found) for loss in record.losses]  # the trainer has divided them
        record.weigh_by_tokens(labelled)


def write_rows(settings: protocol.Settings, folder: Path) -> str:
    """A file of rows that are taken as tokenized because of their keys."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in inputs.labelled_rows(settings)), encoding="utf-8")
    return str(path)


def run_settings(settings: protocol.Settings, longest_row: int, folder: Path) -> dict[str, Any]:
    """What would stand in the file for `axolotl train`."""
    micro_batch_rows = settings["micro_batch_rows"] or settings["rows_per_step"]
    arguments = {
        "base_model": settings["model"],
        "adapter": "lora",
        "lora_model_dir": inputs.adapter_with_dropout(settings, folder),
        # The file of the adapter decides, but the configuration is checked for these.
        "lora_r": 1,
        "lora_alpha": 1,
        "lora_target_linear": True,
        "lora_mlp_kernel": False,  # Triton, switched on without being asked for
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "datasets": [{"path": write_rows(settings, folder), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(folder / "prepared"),
        "shuffle_merged_datasets": False,
        "curriculum_sampling": True,  # its name for rows in the order of the file
        "val_set_size": 0,
        "sequence_len": longest_row,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "attn_implementation": "sdpa",
        "output_dir": str(folder / "output"),
        "device": "cpu",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "max_steps": len(settings["steps"]),
        "micro_batch_size": micro_batch_rows,
        "gradient_accumulation_steps": settings["rows_per_step"] // micro_batch_rows,
        "optimizer": "adamw_torch_fused",
        "learning_rate": settings["learning_rate"],
        "lr_scheduler": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "seed": settings["seed"],
        "torch_compile": settings["compile"],
        "save_strategy": "no",
        "logging_steps": 1_000,
    }
    if settings["gradient_checkpointing"] is not None:
        arguments["gradient_checkpointing"] = settings["gradient_checkpointing"]
    return arguments


def main() -> None:
    settings, answers = protocol.begin()
    check_settings(settings)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    rows = protocol.read_rows(settings)
    with tempfile.TemporaryDirectory() as folder:
        longest_row = max(len(row["input_ids"]) for row in rows)
        config = load_cfg(DictDefault(run_settings(settings, longest_row, Path(folder))))
        trainer = setup_model_and_trainer(config, load_datasets(cfg=config))[0]
        trainer.__class__ = sft.measured_trainer(type(trainer))
        trainer.clock = sft.TrainerClock()
        trainer.add_callback(trainer.clock)
        execute_training(config, trainer, None)
    if not trainer.model_accepts_loss_kwargs:
        weigh_by_tokens(trainer.clock.records[:-1], rows)
    trained = sft.trained_answer(trainer, rows)
    trained["resolved"]["trained_loss"] = (
        "mean over tokens"
        if trainer.model_accepts_loss_kwargs or config.gradient_accumulation_steps == 1
        else "mean of the micro-batches' means"
    )
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "axolotl")}
    protocol.answer(answers, {"library": "axolotl", "versions": versions, **trained})


if __name__ == "__main__":
    main()
