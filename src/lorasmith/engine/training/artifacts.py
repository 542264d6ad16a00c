"""What a finished run leaves: the PEFT folder with tokenizer, passport, loss plot and model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.rendering import prompt_ids
from lorasmith.engine.lora.quantized import Quantization
from lorasmith.engine.models.loading import base_fingerprint
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.training.initial import save_adapter
from lorasmith.engine.training.loop import TrainingRun
from lorasmith.files import sha256_bytes, staged_folder, write_json, write_text
from lorasmith.schemas.data import Message
from lorasmith.schemas.jobs import JobOrder
from lorasmith.schemas.training import TrainingInputs, TrainingResult, TrainingSpec

PROBES = (
    [Message(role="user", content="Hello")],
    [Message(role="system", content="Be brief."), Message(role="user", content="What is 2 + 2?")],
    [
        Message(role="user", content="def f(x):"),
        Message(role="assistant", content="    return x"),
        Message(role="user", content="Once more."),
    ],
)


def write_adapter(
    job: Path,
    order: JobOrder,
    training: TrainingRun,
    tokenizer: PreTrainedTokenizerBase,
    base_folder: Path,
    result: TrainingResult,
    report: Reporter,
) -> None:
    """`adapter/` in the job folder: what `peft.PeftModel.from_pretrained` loads, and what people and servers check."""
    spec, inputs = TrainingSpec.model_validate(order.spec), TrainingInputs.model_validate(order.inputs)
    with staged_folder(job / "adapter", replace=True, point="adapter") as folder:
        training.model.peft_config["default"].base_model_name_or_path = inputs.model_name
        save_adapter(training.model, folder, training.initial)
        tokenizer.save_pretrained(folder)
        write_json(folder / "passport.json", passport(order, spec, inputs, tokenizer, base_folder, result))
        write_json(folder / "training_config.json", spec.model_dump())
        try:
            plot_loss(folder / "loss.png", training, result)
        except (MemoryError, ImportError) as error:  # a library that finds no memory for itself is an ImportError
            report("warning", text=f"loss.png is left out: {str(error) or 'the machine ran out of memory'}")
        plot = "![training and validation loss](loss.png)\n" if (folder / "loss.png").exists() else ""
        write_text(folder / "README.md", model_card(spec, inputs, result, plot))


def passport(
    order: JobOrder,
    spec: TrainingSpec,
    inputs: TrainingInputs,
    tokenizer: PreTrainedTokenizerBase,
    base_folder: Path,
    result: TrainingResult,
) -> dict[str, Any]:
    """Where the adapter comes from, and the token ids that every server must produce for the probe conversations."""
    template = tokenizer.chat_template
    probes = []
    if isinstance(template, str):
        for messages in PROBES:
            turns = [message.model_dump() for message in messages]
            try:
                probes.append({"messages": turns, "prompt_ids": prompt_ids(tokenizer, messages)})
            except Exception as error:  # templates raise on purpose, for example on a system turn
                probes.append({"messages": turns, "refused": str(error)})
    return {
        "base_model": inputs.model_name,
        "base_fingerprint": base_fingerprint(base_folder),
        "base_quantization": base_quantization(spec),
        "chat_template": template,
        "tokenizer_sha256": sha256_bytes(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()),
        "probes": probes,
        "job": order.id,
        "dataset": {"id": inputs.dataset_id, "name": inputs.dataset_name, "sha256": inputs.dataset_sha256},
        "metrics": {"validation_loss": result.validation_loss, "trained_tokens": result.trained_tokens},
        "parents": [],
    }


def base_quantization(spec: TrainingSpec) -> dict[str, Any] | None:
    """How the base was stored while the adapter was trained, or None where it was as it is on disk."""
    if not spec.training.quantizes:
        return None
    return spec.training.model_dump(include={"quantization", "double_quantization"})


def plot_loss(path: Path, training: TrainingRun, result: TrainingResult) -> None:
    """Training and validation loss over optimizer steps, as a PNG."""
    from matplotlib.figure import Figure  # without pyplot, which takes longer to import than all the rest to draw

    figure = Figure(figsize=(7, 4), dpi=120)
    axes = figure.subplots()
    losses = result.training_loss
    steps = [round((index + 1) * result.total_steps / len(losses)) for index in range(len(losses))]
    axes.plot(steps, losses, color="#4c78a8", linewidth=1.2, label="training")
    if training.progress.validation:
        points = list(zip(*training.progress.validation, strict=True))
        axes.plot(points[0], points[1], color="#e45756", marker="o", markersize=3.5, linewidth=1.6, label="validation")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per trained token)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def changed_settings(spec: TrainingSpec) -> str:
    """Table rows of the LoRA settings that are not at their defaults, beyond those of every card."""
    shown = {"rank", "alpha", "dropout", "target_modules"}
    values = spec.lora.model_dump(exclude_defaults=True, exclude=shown)
    return "".join(f"| {name} | {value} |\n" for name, value in values.items())


def computed_on(result: TrainingResult) -> str:
    return f"{result.threads} threads" if result.device == "cpu" else result.device


def peak_memory(result: TrainingResult) -> str:
    on_gpu = "" if result.gpu_peak_memory_bytes is None else f", {result.gpu_peak_memory_bytes / 1e9:.2f} GB on the GPU"
    return f"{result.peak_memory_bytes / 1e9:.2f} GB{on_gpu}"


def model_card(spec: TrainingSpec, inputs: TrainingInputs, result: TrainingResult, plot: str) -> str:
    """A Hugging Face model card with what was measured and how to use it."""
    validation = (
        ""
        if result.validation_loss is None
        else f"| validation loss (nats per token) | {result.validation_loss:.4f} |\n"
    )
    quantization = Quantization.named(spec.training.quantization, spec.training.double_quantization)
    quantized = (
        f"\nThe base was stored in {quantization} while the adapter was trained. On the base as it is, answers differ\n"
        "from those in training by what quantising takes away.\n"
        if quantization
        else ""
    )
    fallback = "" if result.fallback is None else f"| computed by PEFT, as | {result.fallback} |\n"
    return f"""---
base_model: {inputs.model_name}
library_name: peft
pipeline_tag: text-generation
tags: [lora, lorasmith]
---

# {inputs.adapter_name}

A LoRA adapter for `{inputs.model_name}`, trained on the dataset `{inputs.dataset_name}`
(`sha256:{inputs.dataset_sha256[:16]}…`).
{quantized}
{plot}
| measured | |
|---|---|
| optimizer steps | {result.total_steps} ({result.epochs:.2f} epochs) |
| trained tokens | {result.trained_tokens:,} |
{validation}| training time | {result.training_time_seconds:.0f} s, {result.tokens_per_s:,.0f} tokens/s, {computed_on(result)}, {result.precision} |
| trainable parameters | {result.trainable_parameters:,} of {result.total_parameters:,} |
| peak memory | {peak_memory(result)} |
| rows trained, cut, dropped | {result.rows["trained"]}, {result.rows["cut"]}, {result.rows["dropped"]} |
{fallback}
| setting | |
|---|---|
| rank, alpha, dropout | {spec.lora.rank}, {spec.lora.alpha:g}, {spec.lora.dropout:g} |
| target modules | {spec.lora.target_modules} |
{changed_settings(spec)}| optimizer, learning rate, schedule | {spec.training.optimizer}, {spec.training.learning_rate:g}, {spec.training.lr_scheduler} |
| rows per optimizer step | {spec.training.batch_size * spec.training.gradient_accumulation_steps} |
| seed | {spec.training.seed} |

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{inputs.model_name}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

```
lorasmith chat --adapter {inputs.adapter_name}
```
"""
