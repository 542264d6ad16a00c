"""Unsloth in its CPU mode, as a worker: settings and answer are described in protocol.py."""

from __future__ import annotations

import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import protocol
import unsloth  # before trl and transformers, which it patches

# isort: split

import sft
import torch
from datasets import Dataset
from peft import PeftConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer


def adapted_model(settings: protocol.Settings, longest_row: int) -> tuple[Any, Any]:
    """Base model with Unsloth's own LoRA layers, which take the values of the given adapter, and the tokenizer."""
    dtypes = {"default": None, "fp32": torch.float32, "bf16": torch.float32, "bf16-weights": torch.bfloat16}
    config = PeftConfig.from_pretrained(settings["adapter"])
    checkpointing = settings["gradient_checkpointing"]
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(
        model_name=settings["model"],
        max_seq_length=max(longest_row, settings["packed_tokens"]),
        dtype=dtypes[settings["precision"]],
        load_in_4bit=False,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=sorted(config.target_modules),
        lora_dropout=settings["dropout"],
        bias="none",
        use_gradient_checkpointing="unsloth" if checkpointing is None else checkpointing,
        random_state=settings["seed"],
    )
    loaded = set_peft_model_state_dict(model, load_file(Path(settings["adapter"]) / "adapter_model.safetensors"))
    if loaded.unexpected_keys:
        raise ValueError(f"Unsloth's model has no place for {loaded.unexpected_keys[:3]} of the given adapter")
    return model, tokenizer


def main() -> None:
    settings, answers = protocol.begin()
    os.environ["UNSLOTH_CPU_COMPILE"] = str(int(settings["compile"]))  # read when the layers are prepared
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    longest_row = max(len(row["input_ids"]) for row in protocol.read_rows(settings))
    model, tokenizer = adapted_model(settings, longest_row)
    with tempfile.TemporaryDirectory() as output_dir:
        trained = sft.train(
            SFTTrainer,
            settings,
            SFTConfig(**sft.trainer_arguments(settings, longest_row, output_dir)),
            model=model,
            processing_class=tokenizer,
            dataset_class=Dataset,
        )
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl", "unsloth", "unsloth_zoo")}
    protocol.answer(answers, {"library": "unsloth", "versions": versions, **trained})


if __name__ == "__main__":
    main()
