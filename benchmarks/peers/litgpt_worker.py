"""litgpt's LoRA loop, as a worker: settings and answer are described in protocol.py."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import protocol  # first: it starts the clock of load_seconds

# isort: split

import inputs
import lightning
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.data.base import get_sft_collate_fn
from litgpt.finetune import lora as recipe
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import copy_weights_qwen_2_5
from litgpt.utils import get_default_supported_precision, instantiate_torch_optimizer
from safetensors.torch import load_file
from steps import StepClock, step_reports
from torch.utils.data import DataLoader

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "bf16-weights": "bf16-true"}
# litgpt's name of a layer's module: the modules of PEFT's that it holds, one below the other
MODULES = {
    "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.proj": ("self_attn.o_proj",),
    "mlp.fc_1": ("mlp.gate_proj",),
    "mlp.fc_2": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


def check_settings(settings: protocol.Settings) -> None:
    """Refuse what `litgpt finetune_lora` does not offer."""
    if settings["batching"] != "fixed":
        raise ValueError(f"litgpt pads rows in file order, got batching {settings['batching']!r}")
    if settings["compile"]:
        raise ValueError("litgpt compiles in pretraining, not in finetune_lora")
    if settings["gradient_checkpointing"]:
        raise ValueError("litgpt recomputes activations on several GPUs only")


def model_config(settings: protocol.Settings) -> Config:
    """The Qwen2.5 configuration of litgpt in the sizes of the model's own, with LoRA on all linear layers but the head."""
    base = json.loads((Path(settings["model"]) / "config.json").read_text(encoding="utf-8"))
    adapter = json.loads((Path(settings["adapter"]) / "adapter_config.json").read_text(encoding="utf-8"))
    if base["model_type"] != "qwen2":
        raise ValueError(f"this worker builds Qwen2 only, got {base['model_type']!r}")
    adapted = {module.split(".")[1] for modules in MODULES.values() for module in modules}
    if set(adapter["target_modules"]) != adapted:
        raise ValueError(f"the adapter must be on all linear layers, got {adapter['target_modules']}")
    return Config.from_name(
        "Qwen2.5-0.5B",
        block_size=base["max_position_embeddings"],
        vocab_size=base["vocab_size"],
        padded_vocab_size=base["vocab_size"],
        n_layer=base["num_hidden_layers"],
        n_head=base["num_attention_heads"],
        n_query_groups=base["num_key_value_heads"],
        n_embd=base["hidden_size"],
        intermediate_size=base["intermediate_size"],
        norm_eps=base["rms_norm_eps"],
        rope_base=base["rope_parameters"]["rope_theta"],
        lora_r=adapter["r"],
        lora_alpha=adapter["lora_alpha"],
        lora_dropout=settings["dropout"],
        **{f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")},
    )


def load_weights(model: torch.nn.Module, settings: protocol.Settings, config: Config) -> None:
    """The base through litgpt's own conversion, and the adapter under litgpt's names, copied into the model."""
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(Path(settings["model"]).glob("*.safetensors")):
        copy_weights_qwen_2_5(config, {}, weights, load_file(path))
    adapter = load_file(Path(settings["adapter"]) / "adapter_model.safetensors")
    for layer in range(config.n_layer):
        for name, modules in MODULES.items():
            for half in ("lora_A", "lora_B"):
                keys = [f"base_model.model.model.layers.{layer}.{module}.{half}.weight" for module in modules]
                weights[f"transformer.h.{layer}.{name}.{half}"] = torch.cat([adapter[key] for key in keys])
    loaded = model.load_state_dict(weights, strict=False)
    if loaded.missing_keys or loaded.unexpected_keys:
        raise ValueError(
            f"litgpt's model lacks {loaded.missing_keys[:3]} and has no place for {loaded.unexpected_keys[:3]}"
        )


def sample_of(row: dict[str, list[int]]) -> dict[str, Any]:
    """A labelled row as litgpt's SFTDataset gives it."""
    count = len(row["input_ids"])
    return {
        "input_ids": torch.tensor(row["input_ids"]),
        "labels": torch.tensor(row["labels"]),
        "token_counts": {"raw": count, "raw_plus_prompt_template": count},
    }


class MeasuredFabric(lightning.Fabric):
    """Fabric that hands the loss of every micro-batch to the clock."""

    clock: StepClock
    labelled: list[int]  # of each micro-batch of the running step
    micro_batches: int

    def backward(self, tensor: torch.Tensor, *arguments: Any, **named: Any) -> None:
        self.clock.records[-1].losses.append(tensor.detach() * self.micro_batches)  # litgpt has divided it
        super().backward(tensor, *arguments, **named)


class ConstantRate:
    """The schedule: litgpt's own warms up and follows a cosine. It is stepped where a step ends."""

    def __init__(self, fabric: MeasuredFabric, rate: float) -> None:
        self.fabric = fabric
        self.rate = rate

    def get_last_lr(self) -> list[float]:
        return [self.rate]

    def step(self) -> None:
        self.fabric.clock.records[-1].weigh_by_tokens(self.fabric.labelled)
        self.fabric.labelled = []
        self.fabric.clock.end_step()


def main() -> None:
    settings, answers = protocol.begin()
    check_settings(settings)
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    precision = PRECISIONS.get(settings["precision"]) or get_default_supported_precision(training=True)
    fabric = MeasuredFabric(accelerator="cpu", devices=1, precision=precision)
    size = settings["rows_per_step"]
    micro_batch_rows = settings["micro_batch_rows"] or size
    fabric.clock, fabric.labelled, fabric.micro_batches = StepClock(), [], size // micro_batch_rows
    fabric.seed_everything(settings["seed"])
    config = model_config(settings)
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    arguments = {"lr": settings["learning_rate"], "weight_decay": 0.0}
    optimizer = instantiate_torch_optimizer(
        {"class_path": "torch.optim.AdamW", "init_args": arguments}, model.parameters()
    )
    optimizer = fabric.setup_optimizers(optimizer)
    load_weights(model, settings, config)

    ordered = [sample_of(row) for row in inputs.labelled_rows(settings)]
    collate = get_sft_collate_fn()

    def noted_batch(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collate(samples)
        fabric.clock.records[-1].batches.append(batch["input_ids"])
        fabric.labelled.append(int((batch["labels"] != inputs.IGNORED).sum()))
        return batch

    train_loader, no_validation = fabric.setup_dataloaders(
        DataLoader(ordered, batch_size=micro_batch_rows, collate_fn=noted_batch), DataLoader([], collate_fn=collate)
    )
    fabric.clock.begin()
    recipe.fit(
        fabric=fabric,
        model=model,
        optimizer=optimizer,
        scheduler=ConstantRate(fabric, settings["learning_rate"]),
        train_dataloader=train_loader,
        val_dataloader=no_validation,
        devices=1,
        checkpoint_dir=Path(settings["model"]),
        out_dir=Path(settings["model"]),  # nothing is saved
        train=TrainArgs(
            save_interval=None,
            global_batch_size=size,
            micro_batch_size=micro_batch_rows,
            lr_warmup_steps=None,
            epochs=2,  # at the end of the last it generates an example
            max_steps=len(settings["steps"]),
        ),
        eval=EvalArgs(interval=len(ordered) + 1),
        data=None,
    )
    parameters = list(model.parameters())
    answer = {
        "library": "litgpt",
        "versions": {name: version(name) for name in ("torch", "lightning", "litgpt")},
        "resolved": {
            "threads": torch.get_num_threads(),
            "precision": precision,
            "optimizer": type(optimizer.optimizer).__name__,
            "trained_loss": "mean over tokens" if fabric.micro_batches == 1 else "mean of the micro-batches' means",
            "frozen_dtypes": sorted({str(value.dtype) for value in parameters if not value.requires_grad}),
            "trained_dtypes": sorted({str(value.dtype) for value in parameters if value.requires_grad}),
        },
        "steps": step_reports(fabric.clock, protocol.read_rows(settings)),
        "load_seconds": fabric.clock.load_seconds,
        "peak_bytes": protocol.peak_bytes(),
    }
    protocol.answer(answers, answer)


if __name__ == "__main__":
    main()
