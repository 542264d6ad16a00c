"""Memory, time and disk of one run together, and of the same run with something changed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lorasmith.engine.data.rows import row_lengths
from lorasmith.engine.lora.quantized import quantize
from lorasmith.engine.lora.quantized_linear import quantized_elements
from lorasmith.engine.models.precision import matrix_seconds
from lorasmith.engine.training.estimation.memory import (
    Process,
    estimate_disk,
    estimate_memory,
    save_steps,
    validation_count,
)
from lorasmith.engine.training.estimation.micro_batches import dealt_validation, slowest_share
from lorasmith.engine.training.estimation.shape import RunShape
from lorasmith.engine.training.estimation.skeleton import layer_weights
from lorasmith.engine.training.estimation.timing import Rates
from lorasmith.schemas.estimation import DiskEstimate, MemoryEstimate, TimeEstimate

LEAST_UNCERTAINTY = 0.15
READ_SAMPLE_BYTES = 64 << 20
QUANTISED_SAMPLE = torch.Size([1024, 1024])


@dataclass(frozen=True)
class Overheads:
    """Seconds before the first step and behind the last one that no step is; of the first, what further processes take."""

    start_s: float
    end_s: float
    launch_s: float = 0.0


@dataclass(frozen=True)
class Prediction:
    memory: MemoryEstimate
    time: TimeEstimate | None
    disk: DiskEstimate

    @property
    def fits(self) -> bool:
        return self.memory.peak_bytes <= self.memory.available_bytes and self.disk.peak_bytes <= self.disk.free_bytes


def predict(
    shape: RunShape, process: Process, overheads: Overheads, rates: Rates | None, measured: RunShape, folder: Path
) -> Prediction:
    """`measured` is the run that the rates were measured for."""
    disk = estimate_disk(shape, folder)
    memory = estimate_memory(shape, process)
    clock = estimate_time(shape, overheads, scaled(rates, shape, measured), disk) if rates else None
    return Prediction(memory, clock, disk)


def estimate_time(shape: RunShape, overheads: Overheads, rates: Rates, disk: DiskEstimate) -> TimeEstimate:
    plan = shape.plan
    epochs = plan.total_steps / plan.steps_per_epoch
    tokens = shape.part.tokens * epochs
    again = rates.forward_layer_s * share_computed_again(shape)
    cached = 1 - 1 / epochs if disk.prefix_cache_bytes and epochs > 1 else 0.0
    start = overheads.start_s - (overheads.launch_s if shape.processes == 1 else 0.0)
    exchange = 0.0
    if shape.processes > 1:
        exchange = plan.total_steps * (rates.exchange_s + rates.reduce_s * shape.trained_elements)
    per_token = rates.rest_s + (shape.layers - shape.lowest) * (rates.layer_s + again)
    if rates.layers < shape.layers:
        per_token += shape.lowest * rates.forward_layer_s * (1 - cached)
    updates = plan.total_steps * rates.update_s * shape.trained_elements
    training = tokens * slowest_share(shape) * per_token + updates + exchange + rates.first_s
    lengths = row_lengths(shape.validation)
    checked = max(sum(lengths[index] for index in share) for share in dealt_validation(shape))
    forward = rates.forward_rest_s + shape.layers * rates.forward_layer_s
    validation = validation_count(shape) * checked * forward
    saving = (len(save_steps(shape)) * disk.checkpoint_bytes + 2 * disk.adapter_bytes) * rates.save_s
    total = start + training + validation + saving + overheads.end_s
    uncertainty = max(LEAST_UNCERTAINTY, 2 * rates.spread)
    return TimeEstimate(
        total_s=total,
        low_s=total / (1 + uncertainty),
        high_s=total * (1 + uncertainty),
        start_s=start,
        training_s=training,
        exchange_s=exchange,
        validation_s=validation,
        saving_s=saving + overheads.end_s,
        tokens_per_s=tokens / training,
        measured_s=rates.measured_s,
        measured_layers=rates.layers,
        spread=rates.spread,
    )


def scaled(rates: Rates, shape: RunShape, measured: RunShape) -> Rates:
    """Rates of a changed run: by the products that a layer has, and by how fast this machine multiplies what they are of.

    Recomputing is a forward pass more, which `estimate_time` adds. One process instead of several has been measured too.
    """
    values: dict[str, Any] = dict(vars(rates))
    speed = 1.0 if shape.processes == measured.processes else rates.alone
    if (shape.precision, shape.memory) != (measured.precision, measured.memory):
        now = matrix_seconds(shape.precision, packed=shape.memory == "fast")
        speed *= now / matrix_seconds(measured.precision, packed=measured.memory == "fast")
    layer = speed * layer_work(shape) / layer_work(measured)
    values["layer_s"] = max(0.0, rates.layer_s - rates.forward_layer_s * share_computed_again(measured))
    values["layer_s"] *= layer
    for name in ("rest_s", "forward_layer_s", "forward_rest_s"):
        values[name] *= speed
    return Rates(**values)


def share_computed_again(shape: RunShape) -> float:
    """Of a layer's forward pass: with gradient checkpointing all of it, but for the last product of the packed decoder."""
    if not shape.spec.training.gradient_checkpointing:
        return 0.0
    config = shape.base.config
    last = config.intermediate_size * config.hidden_size if shape.decoder else 0
    return 1.0 - last / layer_weights(shape.base, shape.layers)


def layer_work(shape: RunShape) -> float:
    """Multiplications of a layer per token: two products with W, three with A and with B each (forward, x, weight)."""
    adapter = shape.trained_elements / max(1, shape.layers - shape.lowest)
    return 2.0 * layer_weights(shape.base, shape.layers) + 3.0 * adapter


def read_seconds(folder: Path, file_bytes: int) -> float:
    """Of the weights, by how fast the first part of them is read now."""
    path = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if path is None:
        return 0.0
    began = time.perf_counter()
    with path.open("rb") as handle:
        read = len(handle.read(READ_SAMPLE_BYTES))
    return (time.perf_counter() - began) * file_bytes / read


def quantising_seconds(shape: RunShape) -> float:
    """Of the base while it is loaded, by how fast a part of its size is quantised now."""
    if shape.quantization is None:
        return 0.0
    sample = torch.randn(QUANTISED_SAMPLE)
    began = time.perf_counter()
    quantize(sample, shape.quantization)
    return (time.perf_counter() - began) * quantized_elements(shape.base) / sample.numel()


def process_seconds() -> float:
    """Since this process began."""
    return time.time() - float(psutil.Process().create_time())
