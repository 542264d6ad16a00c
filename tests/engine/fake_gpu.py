"""A GPU without a GPU: tensors that have shape, dtype and device, and no data.

A torch that is built without CUDA makes fake tensors for `cuda`, and then does not slice them. So the meta device stands for
the GPU here, on which a step has nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from lorasmith.engine.lora.quantized import dynamic_table, pair_table, table
from lorasmith.engine.lora.quantized_linear import QuantizedLinear
from lorasmith.engine.models.packing import pack
from lorasmith.engine.training.batches import pad_batch

GPU = torch.device("meta")
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
TABLES = (table, pair_table, dynamic_table)


class FakeGpu(FakeTensorMode):
    """An operation on tensors of two devices raises, as on a real one, and so does one whose shape depends on values.

    So do indices that are on the CPU, which a real one lets pass and copies each time.
    A number that is read from a tensor is 1; `reads` counts those of the GPU, which has to be waited for.
    """

    def __init__(self, masked: int | None = None) -> None:
        """`masked`: so many elements are where a mask is true, instead of an error."""
        super().__init__(allow_non_fake_inputs=True)
        self.masked = masked
        self.reads = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.reads += args[0].device == GPU
            return 1.0 if args[0].is_floating_point() else 1
        if func.overloadpacket in INDEXING:
            for index in args[1]:
                if index is not None and index.device != args[0].device:
                    raise RuntimeError(f"indices on {index.device} into a tensor on {args[0].device}")
            args = (args[0], [place for index in args[1] for place in self.places(index)], *args[2:])
        return super().dispatch(func, types, args, kwargs or {})

    def places(self, index: Any) -> list[Any]:
        if self.masked is None or index is None or index.dtype != torch.bool:
            return [index]
        return [torch.zeros(self.masked, dtype=torch.long, device=index.device) for _ in range(index.ndim)]


@contextmanager
def fake_gpu(masked: int | None = None) -> Iterator[FakeGpu]:
    for cached in TABLES:
        cached.cache_clear()
    try:
        with (
            patch("lorasmith.engine.models.families.device_of", lambda tensor: tensor.device),
            patch("lorasmith.engine.training.computation.device_of", lambda tensor: tensor.device),
            patch("lorasmith.engine.training.computation.pack", on_the_cpu(pack)),
            patch("lorasmith.engine.training.computation.pad_batch", on_the_cpu(pad_batch)),
            patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: [GPU.type]),
            FakeGpu(masked) as mode,
        ):
            yield mode
    finally:
        for cached in TABLES:
            cached.cache_clear()  # of tables without data


def on_the_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """With data: which tokens are labelled decides shapes."""

    def run(*given: Any, **settings: Any) -> Any:
        with unset_fake_temporarily():
            return function(*given, **settings)

    return run


def move_to_gpu(model: torch.nn.Module) -> None:
    """With the weights that `to` leaves, as they were loaded onto their device."""
    model.to(GPU)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            module.stored = moved(module.stored)


def moved(weight: Any) -> Any:
    """A dataclass with its tensors, and those of dataclasses in it, on the GPU."""
    found = {}
    for field in fields(weight):
        value = getattr(weight, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value.to(GPU)
        elif is_dataclass(value):
            found[field.name] = moved(value)
    return replace(weight, **found)
