"""torchtune's single-device LoRA recipe, as a worker: settings and answer are described in protocol.py."""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import inputs
import protocol
import torch
import torchtune
from omegaconf import OmegaConf
from safetensors.torch import load_file
from steps import StepClock, step_reports
from torchtune.datasets import PackedDataset
from torchtune.models.convert_weights import get_mapped_key
from torchtune.models.qwen2._convert_weights import _FROM_HF
from torchtune.modules.peft import get_adapter_params

ATTENTION = ("q_proj", "k_proj", "v_proj", "output_proj")
MLP = {"gate_proj", "up_proj", "down_proj"}
DTYPES = {"default": "bf16", "fp32": "fp32", "bf16-weights": "bf16"}  # bf16 is what its own configurations say


def recipe_class() -> Any:
    """The class of `tune run lora_finetune_single_device`, from its file: the folder of recipes refuses to be imported."""
    path = Path(torchtune.__file__).parents[1] / "recipes" / "lora_finetune_single_device.py"
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LoRAFinetuneRecipeSingleDevice


def recipe_settings(settings: protocol.Settings, output_dir: str) -> dict[str, Any]:
    """The recipe's configuration file for a setting: the shipped one of Qwen2, with what the protocol asks for."""
    if settings["precision"] not in DTYPES:
        raise ValueError("torchtune has no autocast: precision must be fp32 or bf16-weights")
    if settings["batching"] not in ("fixed", "packed"):
        raise ValueError(f"torchtune pads rows or packs them, got batching {settings['batching']!r}")
    packed = settings["batching"] == "packed"
    micro_batch_rows = 1 if packed else settings["micro_batch_rows"] or settings["rows_per_step"]
    checkpointing = settings["gradient_checkpointing"]
    return {
        "output_dir": output_dir,
        "model": model_settings(settings),
        "tokenizer": {"_component_": "types.SimpleNamespace", "pad_id": 0},  # it is asked for nothing else
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "checkpoint_dir": settings["model"],
            "checkpoint_files": [path.name for path in sorted(Path(settings["model"]).glob("*.safetensors"))],
            "output_dir": output_dir,
            "model_type": "QWEN2",
        },
        "resume_from_checkpoint": False,
        "dataset": {
            "_component_": "__main__.rows_to_train",
            "packed": packed,
            **{name: settings[name] for name in ("rows", "steps", "rows_per_step", "packed_tokens")},
        },
        "seed": settings["seed"],
        "shuffle": False,
        "batch_size": micro_batch_rows,
        "optimizer": {
            "_component_": "torch.optim.AdamW",
            "fused": True,
            "weight_decay": 0.0,
            "lr": settings["learning_rate"],
        },
        "lr_scheduler": {},  # `_setup_lr_scheduler` below
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "epochs": 1,
        "max_steps_per_epoch": None,
        "gradient_accumulation_steps": 1 if packed else settings["rows_per_step"] // micro_batch_rows,
        "clip_grad_norm": None,
        "compile": settings["compile"],
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": output_dir},
        "device": "cpu",
        "dtype": DTYPES[settings["precision"]],
        "enable_activation_checkpointing": True if checkpointing is None else checkpointing,
        "enable_activation_offloading": False,
    }


def model_settings(settings: protocol.Settings) -> dict[str, Any]:
    """The builder of a Qwen2 with LoRA on all linear layers, and its arguments."""
    base = json.loads((Path(settings["model"]) / "config.json").read_text(encoding="utf-8"))
    adapter = json.loads((Path(settings["adapter"]) / "adapter_config.json").read_text(encoding="utf-8"))
    if base["model_type"] != "qwen2":
        raise ValueError(f"this worker builds Qwen2 only, got {base['model_type']!r}")
    if set(adapter["target_modules"]) != {"q_proj", "k_proj", "v_proj", "o_proj", *MLP}:
        raise ValueError(f"the adapter must be on all linear layers, got {adapter['target_modules']}")
    return {
        "_component_": "torchtune.models.qwen2.lora_qwen2",
        "lora_attn_modules": list(ATTENTION),
        "apply_lora_to_mlp": True,
        "vocab_size": base["vocab_size"],
        "num_layers": base["num_hidden_layers"],
        "num_heads": base["num_attention_heads"],
        "num_kv_heads": base["num_key_value_heads"],
        "embed_dim": base["hidden_size"],
        "intermediate_dim": base["intermediate_size"],
        "max_seq_len": base["max_position_embeddings"],
        "norm_eps": base["rms_norm_eps"],  # the builder's own default is ten times as large
        "rope_base": base["rope_parameters"]["rope_theta"],
        "tie_word_embeddings": base["tie_word_embeddings"],
        "lora_rank": adapter["r"],
        "lora_alpha": adapter["lora_alpha"],
        "lora_dropout": settings["dropout"],
    }


def rows_to_train(
    tokenizer: Any, *, rows: str, steps: list[int], rows_per_step: int, packed: bool, packed_tokens: int
) -> list[dict[str, Any]]:
    """The rows of the wanted steps as torchtune's datasets give them, or the wanted packs of all rows."""
    all_steps = list(range(len(protocol.read_rows({"rows": rows})) // rows_per_step))
    wanted = {"rows": rows, "rows_per_step": rows_per_step, "steps": all_steps if packed else steps}
    samples = [{"tokens": row["input_ids"], "labels": row["labels"]} for row in inputs.labelled_rows(wanted)]
    if not packed:
        return samples
    packs = PackedDataset(samples, max_seq_len=packed_tokens, padding_idx=tokenizer.pad_id)
    return [packs[number] for number in steps]


def tune_adapter(folder: Path) -> dict[str, torch.Tensor]:
    """PEFT's adapter under torchtune's names."""
    renamed = {}
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        module, half, _ = name.removeprefix("base_model.model.").rsplit(".", 2)
        weight = get_mapped_key(f"{module}.weight", _FROM_HF)
        renamed[f"{weight.removesuffix('weight')}{half.lower()}.weight"] = value
    return renamed


class MeasuredRecipe(recipe_class()):
    """The recipe from the given adapter, at a constant rate, without a checkpoint at its end; its steps go to the clock."""

    def __init__(self, cfg: Any, adapter: dict[str, torch.Tensor]) -> None:
        super().__init__(cfg)
        self.adapter = adapter
        self.clock = StepClock()
        self.labelled: list[int] = []  # of each micro-batch of the running step

    def _setup_model(self, **named: Any) -> torch.nn.Module:
        return super()._setup_model(**{**named, "lora_weights_state_dict": self.adapter})

    def _setup_lr_scheduler(self, **_: Any) -> MeasuredRecipe:
        return self  # the recipe steps its schedule where a step ends, and torchtune has no constant one

    def _loss_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        record = self.clock.records[-1]
        record.batches.append(batch["tokens"])
        self.labelled.append(int((batch["labels"] != self._loss_fn.ignore_index).sum()))
        loss = super()._loss_step(batch)
        record.losses.append(loss.detach())
        return loss

    def step(self) -> None:
        self.clock.records[-1].weigh_by_tokens(self.labelled)
        self.labelled = []
        self.clock.end_step()

    def save_checkpoint(self, epoch: int) -> None:
        pass


def main() -> None:
    settings, answers = protocol.begin()
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    with tempfile.TemporaryDirectory() as output_dir:
        config = OmegaConf.create(recipe_settings(settings, output_dir))
        recipe = MeasuredRecipe(config, tune_adapter(Path(settings["adapter"])))
        recipe.setup(config)
        recipe.clock.begin()
        recipe.train()
        recipe.cleanup()
    trained = get_adapter_params(recipe._model)
    frozen = {str(value.dtype) for name, value in recipe._model.named_parameters() if name not in trained}
    answer = {
        "library": "torchtune",
        "versions": {name: version(name) for name in ("torch", "torchtune", "torchao")},
        "resolved": {
            "threads": torch.get_num_threads(),
            "gradient_checkpointing": config.enable_activation_checkpointing,
            "compile": config.compile,
            "loss": type(recipe._loss_fn).__name__,
            "optimizer": type(recipe._optimizer).__name__,
            "frozen_dtypes": sorted(frozen),
            "trained_dtypes": sorted({str(value.dtype) for value in trained.values()}),
        },
        "steps": step_reports(recipe.clock, protocol.read_rows(settings)),
        "load_seconds": recipe.clock.load_seconds,
        "peak_bytes": protocol.peak_bytes(),
    }
    protocol.answer(answers, answer)


if __name__ == "__main__":
    main()
