"""TRL's SFTTrainer with a PEFT adapter, as a worker: settings and answer are described in protocol.py."""

from __future__ import annotations

import tempfile
from importlib.metadata import version

import protocol
import sft
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path


def adapted_model(settings: protocol.Settings) -> PeftModel:
    """The base in the dtype that the settings ask for (TRL's own default is float32) with the given adapter."""
    dtype = {"dtype": torch.bfloat16} if settings["precision"] == "bf16-weights" else {}
    base = create_model_from_path(settings["model"], **dtype)
    config = PeftConfig.from_pretrained(settings["adapter"])
    config.lora_dropout = settings["dropout"]
    return PeftModel.from_pretrained(base, settings["adapter"], config=config, is_trainable=True)


def main() -> None:
    settings, answers = protocol.begin()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    longest_row = max(len(row["input_ids"]) for row in protocol.read_rows(settings))
    with tempfile.TemporaryDirectory() as output_dir:
        arguments = sft.trainer_arguments(settings, longest_row, output_dir)
        trained = sft.train(
            SFTTrainer,
            settings,
            SFTConfig(**arguments, torch_compile=settings["compile"]),
            model=adapted_model(settings),
            processing_class=AutoTokenizer.from_pretrained(settings["model"]),
            dataset_class=Dataset,
        )
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "trl")}
    protocol.answer(answers, {"library": "trl", "versions": versions, **trained})


if __name__ == "__main__":
    main()
