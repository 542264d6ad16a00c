"""What the workers on transformers' Trainer share: one that keeps what each step trained on, how long it took and what it
lost. For TRL and Unsloth also SFTTrainer's arguments for a setting, and the rows in its order."""

from __future__ import annotations

from typing import Any

import protocol
import torch
from steps import StepClock, step_reports
from transformers import TrainerCallback

BATCHINGS = ("fixed", "flat", "grouped", "packed")
EOS_ID = 1


def trainer_arguments(settings: protocol.Settings, longest_row: int, output_dir: str) -> dict[str, Any]:
    """Keyword arguments of SFTConfig. What the settings leave to the library is left out."""
    rows_per_step, batching = settings["rows_per_step"], settings["batching"]
    if batching not in BATCHINGS:
        raise ValueError(f"batching must be one of {', '.join(BATCHINGS)}, got {batching!r}")
    micro_batch_rows = settings["micro_batch_rows"] or rows_per_step
    arguments: dict[str, Any] = {
        "output_dir": output_dir,
        "use_cpu": True,
        "max_steps": len(settings["steps"]),
        "per_device_train_batch_size": micro_batch_rows,
        "gradient_accumulation_steps": rows_per_step // micro_batch_rows,
        "max_length": longest_row,
        "completion_only_loss": True,  # else rows that are already token ids train on every token
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "seed": settings["seed"],
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    if settings["precision"] != "default":
        arguments["bf16"] = settings["precision"] != "fp32"
    if settings["gradient_checkpointing"] is not None:
        arguments["gradient_checkpointing"] = settings["gradient_checkpointing"]
    if batching == "flat":
        arguments |= {"padding_free": True, "max_length": None}
    elif batching == "grouped":
        arguments["train_sampling_strategy"] = "group_by_length"
    elif batching == "packed":
        if settings["packed_tokens"] < longest_row:
            raise ValueError(f"packed_tokens must hold the longest row, {longest_row}, got {settings['packed_tokens']}")
        arguments |= {
            "packing": True,
            "max_length": settings["packed_tokens"],
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 1,
        }
    return arguments


def check_arguments(settings: protocol.Settings, arguments: Any) -> None:
    """Refuse a run that would not be what its settings say: Unsloth turns options off on a CPU and goes on."""
    wanted = {"padding_free": settings["batching"] == "flat", "packing": settings["batching"] == "packed"}
    if settings["precision"] != "default":
        wanted["bf16"] = settings["precision"] != "fp32"
    for name, value in wanted.items():
        if bool(getattr(arguments, name)) != value:
            raise ValueError(f"the library turned {name} {'off' if value else 'on'}")


def rows_to_train(settings: protocol.Settings, rows: list[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """The rows of the wanted steps, in the trainer's own order; all rows for packing, which chooses its own."""
    if settings["batching"] == "packed":
        return rows
    ordered = rows
    if settings["batching"] == "grouped":  # within one mega-batch LengthGroupedSampler sorts from long to short
        ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    size = settings["rows_per_step"]
    return [row for step in settings["steps"] for row in ordered[step * size : (step + 1) * size]]


class TrainerClock(StepClock, TrainerCallback):
    """The clock, told by the trainer."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begin()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end_step()


def measured_trainer(trainer_class: type) -> type:
    """The trainer class, with every micro-batch and its loss handed to the clock in `clock`."""

    class MeasuredTrainer(trainer_class):
        clock: TrainerClock

        def training_step(self, model: Any, inputs: dict[str, Any], *arguments: Any, **named: Any) -> torch.Tensor:
            record = self.clock.records[-1]
            record.batches.append(inputs["input_ids"])
            loss = super().training_step(model, inputs, *arguments, **named)
            record.losses.append(loss.detach())
            return loss

    return MeasuredTrainer


def train(trainer_class: type, settings: protocol.Settings, arguments: Any, **parts: Any) -> dict[str, Any]:
    """Train the wanted steps and return the answer, without the library's name and its versions.

    parts: model, processing_class and dataset_class (datasets.Dataset), as SFTTrainer takes them.
    """
    check_arguments(settings, arguments)
    rows = protocol.read_rows(settings)
    dataset = parts.pop("dataset_class").from_list(rows_to_train(settings, rows))
    clock = TrainerClock()
    trainer = measured_trainer(trainer_class)(args=arguments, train_dataset=dataset, callbacks=[clock], **parts)
    trainer.clock = clock
    if settings["batching"] == "packed":
        trainer.train_dataset = trainer.train_dataset.select(settings["steps"])
    trainer.train()
    return trained_answer(trainer, rows)


def trained_answer(trainer: Any, rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """The answer of a measured trainer that has trained, without the library's name and its versions."""
    arguments, clock = trainer.args, trainer.clock
    frozen = {str(parameter.dtype) for parameter in trainer.model.parameters() if not parameter.requires_grad}
    trained = {str(parameter.dtype) for parameter in trainer.model.parameters() if parameter.requires_grad}
    return {
        "resolved": {
            "threads": torch.get_num_threads(),
            "bf16_autocast": bool(arguments.bf16),
            "gradient_checkpointing": bool(arguments.gradient_checkpointing),
            "optimizer": str(arguments.optim),
            "attention": trainer.model.config._attn_implementation,
            "frozen_dtypes": sorted(frozen),
            "trained_dtypes": sorted(trained),
        },
        "steps": step_reports(clock, rows),
        "load_seconds": clock.load_seconds,
        "peak_bytes": protocol.peak_bytes(),
    }
