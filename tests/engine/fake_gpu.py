"""A GPU without a GPU: tensors that have shape, dtype and device, and no data.

A torch that is built without CUDA makes fake tensors for `cuda`, and then does not slice them. So the meta device stands for
the GPU here, on which a step has nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from lorasmith.engine.lora.quantized import dynamic_table, pair_table, table
from lorasmith.engine.lora.quantized_linear import QuantizedLinear
from lorasmith.engine.models.packing import PackedRows, pack

GPU = torch.device("meta")
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default)
INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
TABLES = (table, pair_table, dynamic_table)


class FakeGpu(FakeTensorMode):
    """An operation on tensors of two devices raises, as on a real one, and so does one whose shape depends on values.

    So do indices that are on the CPU, which a real one lets pass and copies each time.
    A number that is read from a tensor is 1; `reads` counts those of the GPU, which has to be waited for.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.reads = 0

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.reads += args[0].device == GPU
            return 1.0 if args[0].is_floating_point() else 1
        if func.overloadpacket in INDEXING:
            for index in args[1]:
                if index is not None and index.device != args[0].device:
                    raise RuntimeError(f"indices on {index.device} into a tensor on {args[0].device}")
        return super().dispatch(func, types, args, kwargs or {})


@contextmanager
def fake_gpu() -> Iterator[FakeGpu]:
    for cached in TABLES:
        cached.cache_clear()
    try:
        with (
            patch("lorasmith.engine.models.families.device_of", lambda tensor: tensor.device),
            patch("lorasmith.engine.training.computation.pack", packed_on_the_cpu),
            patch("torch.optim.optimizer._get_fused_kernels_supported_devices", lambda: [GPU.type]),
            FakeGpu() as mode,
        ):
            yield mode
    finally:
        for cached in TABLES:
            cached.cache_clear()  # of tables without data


def packed_on_the_cpu(*rows: Any, **settings: Any) -> PackedRows:
    """With data: which tokens are labelled decides shapes."""
    with unset_fake_temporarily():
        return pack(*rows, **settings)


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
