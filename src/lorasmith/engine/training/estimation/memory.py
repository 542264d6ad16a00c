"""Memory and disk of a run, part by part: what the process has, weights, adapter, step, checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from lorasmith.engine.data.rows import ChosenRows
from lorasmith.engine.data.token_store import store_bytes
from lorasmith.engine.lora.frozen import FrozenMatrix, PackedMatrix, PlainMatrix
from lorasmith.engine.models.families import Decoder, multiply_in_integers
from lorasmith.engine.training.checkpoints import trainable
from lorasmith.engine.training.choices import FREE_DISK_SHARE, SHORT_ROW_TOKENS
from lorasmith.engine.training.computation import Computation
from lorasmith.engine.training.devices import buckets
from lorasmith.engine.training.estimation.micro_batches import dealt_validation, growing_batches, records
from lorasmith.engine.training.estimation.rehearsal import Prepare, whole_growth
from lorasmith.engine.training.estimation.shape import RunShape
from lorasmith.engine.training.estimation.skeleton import (
    adapted_skeleton,
    few_layers,
    fitted,
    lend_memory,
    quantize_skeleton,
    shortened,
    skeleton,
)
from lorasmith.engine.training.initial import moves_weight
from lorasmith.engine.training.schedule import interval
from lorasmith.files import existing_parent
from lorasmith.schemas.estimation import DiskEstimate, MemoryEstimate
from lorasmith.schemas.training import OptimizerName

LOG_BYTES = 600  # an event, a TensorBoard record
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt")
BLOCK_8BIT = 256  # elements of adamw_8bit that share a scale
LEAST_8BIT = 4096  # smaller tensors keep their state in fp32
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
CGROUP_USES = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


@dataclass(frozen=True)
class Process:
    """Measured: resident bytes once rows are tokenised, and what libraries take more when they compute.

    Of the resident bytes the packed decoder gives `freed_bytes` back before its first step. The first of several processes also
    draws the losses at the end.
    """

    resident_bytes: int
    libraries_bytes: int
    freed_bytes: int = 0
    drawing_bytes: int = 0
    further_bytes: int = 0  # resident in each further process


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    """What a process may take now: free memory, or what a container has left."""
    available = int(psutil.virtual_memory().available)
    for limit, use in zip(CGROUP_LIMITS, CGROUP_USES, strict=True):
        try:
            available = min(available, int(Path(limit).read_text()) - int(Path(use).read_text()))
        except (OSError, ValueError):
            continue  # no such version of cgroups, or no limit
    return max(0, available)


def estimate_memory(shape: RunShape, process: Process) -> MemoryEstimate:
    frozen = shape.weight_bytes
    mapped = shape.stored.mapped(shape.dtype) and shape.quantization is None
    packed = 0
    if shape.decoder is not None:
        layers, joined, head = matrix_bytes(shape.decoder)
        if shape.memory == "fast":
            packed = 2 * (layers + head)
            frozen -= 0 if mapped else layers  # a mapped file stays mapped, whole
        elif mapped:
            frozen += joined  # q, k, v become one matrix; the file still has theirs
    adapter = adapter_bytes(shape)
    rehearse_steps([shape])
    step = shape.step_bytes or 0
    saving = max(0, state_bytes(shape) - shape.trained_elements * 4)  # in the place of the gradients
    reduction = reduction_bytes(shape)
    freed = process.freed_bytes if shape.decoder is not None else 0
    held = frozen + packed + adapter - freed
    training = held + step + process.libraries_bytes
    read = shape.stored.largest_bytes if shape.quantization else shape.stored.file_bytes  # at once, beside its copy
    loading = shape.weight_bytes + (0 if mapped else read)
    first = process.resident_bytes + max(training + max(saving, reduction), loading, held + process.drawing_bytes)
    further = process.further_bytes + max(training + reduction, loading)  # writes nothing
    peaks = [first, *[further] * (shape.processes - 1)]
    return MemoryEstimate(
        peak_bytes=sum(peaks),
        process_peaks_bytes=peaks,
        process_bytes=process.resident_bytes - freed,
        libraries_bytes=process.libraries_bytes,
        weights_bytes=frozen,
        packed_bytes=packed,
        adapter_bytes=adapter,
        step_bytes=step,
        saving_bytes=saving,
        reduction_bytes=reduction,
        loading_bytes=process.resident_bytes + loading,
        available_bytes=available_bytes() + resident_bytes(),
    )


def matrix_bytes(decoder: Decoder) -> tuple[int, int, int]:
    """Of the layers' matrices, of those of them that are joined from several, and of the head."""
    size = decoder.dtype.itemsize
    bytes_of = {id(group): matrix_elements(group.weight) * size for group in decoder.groups}
    joined = sum(bytes_of[id(group)] for group in decoder.groups if len(group.modules) > 1)
    return sum(bytes_of.values()), joined, matrix_elements(decoder.head) * size


def matrix_elements(matrix: object) -> int:
    weight = getattr(matrix, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else 0


def adapter_bytes(shape: RunShape) -> int:
    """fp32 weights and gradients, optimizer state, and the start where it was part of W."""
    return shape.trained_elements * (12 if moves_weight(shape.lora.init) else 8) + state_bytes(shape)


def reduction_bytes(shape: RunShape) -> int:
    """The gradients that are summed over the processes at a time, and the copy that receives the sum."""
    if shape.processes == 1:
        return 0
    return 2 * 4 * max(sum(map(Tensor.numel, bucket)) for bucket in buckets(trainable(shape.model).values()))


def state_bytes(shape: RunShape) -> int:
    return sum(
        optimizer_bytes(shape.spec.training.optimizer, tuple(parameter.shape))
        for parameter in trainable(shape.model).values()
    )


def optimizer_bytes(name: OptimizerName, shape: tuple[int, ...]) -> int:
    """State of one fp32 weight: two moments; or rows and columns of the second; or one momentum."""
    elements = prod(shape)
    if name == "adafactor":
        return 4 * (elements // shape[-1] + elements // shape[-2] if len(shape) > 1 else elements)
    if name in ("lion", "muon"):
        return 4 * elements
    if name == "adamw_8bit" and elements >= LEAST_8BIT:
        return 2 * (elements + 4 * -(-elements // BLOCK_8BIT))
    return 2 * 4 * elements


def rehearse_steps(shapes: Sequence[RunShape]) -> None:
    """Find what the largest steps and validations take, of all runs at once."""
    waiting = [
        (
            shape,
            whole_growth(partial(preparation, shape), shape.layers - shape.lowest, retained=shape.decoder is not None),
        )
        for shape in shapes
        if shape.step_bytes is None
    ]
    for shape, growth in waiting:
        shape.step_bytes = growth()


def preparation(shape: RunShape, layers: int) -> Prepare:
    """To be rehearsed: validation and steps with so many layers from the lowest adapted one on."""
    return lambda: partial(go_through, shape, prepared(shape, layers))


def prepared(shape: RunShape, layers: int) -> Computation:
    settings = shape.spec.training
    if shape.decoder is not None:
        decoder = few_layers(shape.decoder, layers)
        lend_decoder_memory(decoder, packed=shape.memory == "fast")
        if shape.precision == "int16":
            multiply_in_integers(decoder)
        return shape.computation(decoder)
    base = skeleton(shortened(shape.base.config, layers), shape.dtype)
    if shape.quantization:
        quantize_skeleton(base, shape.quantization, shape.folder)
    model = adapted_skeleton(base, fitted(shape.lora, base))
    lend_memory(model)
    if settings.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if max(len(row.ids) for row in shape.part.rows) <= SHORT_ROW_TOKENS:
        base.set_attn_implementation("eager")
    return shape.computation(model=model)


def lend_decoder_memory(decoder: Decoder, *, packed: bool) -> None:
    """Give trained weights and their gradients memory that is never touched, and frozen ones the layout of the run."""
    for update in (update for group in decoder.groups for update in group.updates):
        for name in ("A", "B"):
            given = nn.Parameter(torch.empty(getattr(update, name).shape))
            given.grad = torch.empty_like(given)
            setattr(update, name, given)
    if packed:
        decoder.head = as_packed(decoder.head)
        for group in decoder.groups:
            group.weight = as_packed(group.weight)


def as_packed(matrix: FrozenMatrix) -> FrozenMatrix:
    """A packed matrix by its shapes alone."""
    if not isinstance(matrix, PlainMatrix):
        return matrix
    packed = PackedMatrix.__new__(PackedMatrix)
    packed.towards, packed.back = matrix.weight, matrix.weight.t()
    return packed


def go_through(shape: RunShape, computation: Computation) -> None:
    """Validation, then the steps that make buffers grow."""
    rows = shape.validation
    checked = (batch for share in dealt_validation(shape) for batch in computation.micro_batches(share, rows))
    for batch in records(checked, rows):
        computation.loss(batch, rows)
    for batch in growing_batches(computation, shape):
        computation.gradients(batch, shape.part.rows, scale=1.0, step=0)


def estimate_disk(shape: RunShape, folder: Path) -> DiskEstimate:
    settings, plan = shape.spec.training, shape.plan
    saves = len(save_steps(shape))
    adapter = adapter_file_bytes(shape)
    checkpoint = adapter + shape.trained_elements * 4 + state_bytes(shape)
    kept = min(saves, settings.keep_checkpoints)
    best = shape.trained_elements * 4 * 2 if settings.keep_best else 0
    initial = shape.trained_elements * 4 if moves_weight(shape.lora.init) else 0
    free = shutil.disk_usage(existing_parent(folder)).free
    prefix = prefix_bytes(shape, free)
    parts = [rows for rows in (shape.part.rows, shape.validation) if isinstance(rows, ChosenRows)]
    tokens = sum(store_bytes(rows.rows.lengths) for rows in parts)  # whole rows, before they are cut
    finished = adapter + tokenizer_bytes(shape)
    most = min(saves, settings.keep_checkpoints + 1) * checkpoint
    logs = LOG_BYTES * (plan.total_steps // interval(settings.log_every, plan.total_steps, at_least=20))
    return DiskEstimate(
        peak_bytes=max(most, kept * checkpoint + 2 * finished) + prefix + best + initial + logs + tokens,
        checkpoint_bytes=checkpoint,
        checkpoints=kept,
        prefix_cache_bytes=prefix,
        token_store_bytes=tokens,
        adapter_bytes=finished,
        free_bytes=free,
    )


def save_steps(shape: RunShape) -> list[int]:
    total = shape.plan.total_steps
    every = interval(shape.spec.training.save_every, total, at_least=3)
    return sorted({*range(every, total + 1, every), total})


def validation_count(shape: RunShape) -> int:
    """Passes over the validation part: before the first step, on the way, and at the end."""
    total = shape.plan.total_steps
    every = interval(shape.spec.training.eval_every, total, at_least=10)
    return 1 + len({*range(every, total + 1, every), total})


def adapter_file_bytes(shape: RunShape) -> int:
    """`adapter_model.safetensors`: fp32, of twice the rank where the start was part of W."""
    return shape.trained_elements * 4 * (2 if moves_weight(shape.lora.init) else 1)


def tokenizer_bytes(shape: RunShape) -> int:
    return sum(path.stat().st_size for name in TOKENIZER_FILES if (path := shape.folder / name).is_file())


def prefix_bytes(shape: RunShape, free: int) -> int:
    """What the layers below the lowest adapter compute, for the rows that fit into the limit."""
    settings = shape.spec.training
    if not shape.lowest or settings.num_epochs <= 1 or shape.decoder is None:
        return 0
    limit = min(settings.prefix_cache_gb * 1e9, FREE_DISK_SHARE * free)
    row_bytes = [len(row.ids) * shape.decoder.embedding.shape[1] * shape.dtype.itemsize for row in shape.part.rows]
    return max((end for end in accumulate(row_bytes) if end <= limit), default=0)
