"""Where a run is computed: on the CPU, or on a GPU that torch reaches through CUDA."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

import psutil
import torch
from torch import Tensor

from lorasmith.errors import InvalidSpec
from lorasmith.schemas.training import DeviceSetting

Device = Literal["cpu", "cuda"]
CPU = torch.device("cpu")


def choose_device(wanted: DeviceSetting, *, processes: int = 1) -> Device:
    """cuda where it is asked for, or there and free to be taken. Raises `InvalidSpec` where it is asked for and cannot be."""
    if wanted == "cpu" or (wanted == "auto" and (processes > 1 or not torch.cuda.is_available())):
        return "cpu"
    if processes > 1:
        raise InvalidSpec(
            f"{processes} processes share the cores of a CPU, and training.device is cuda",
            hint="--set training.processes=1, or --set training.device=cpu",
        )
    if not torch.cuda.is_available():
        has_cuda = torch.version.cuda is not None or torch.version.hip is not None
        way = "nvidia-smi says whether the driver sees one" if has_cuda else "install a torch that is built with CUDA"
        raise InvalidSpec(
            f"training.device is cuda, and torch {torch.__version__} sees no GPU here",
            hint=f"{way}; or --set training.device=cpu",
        )
    return "cuda"


def device_of(tensor: Tensor) -> torch.device:
    """Where a tensor is; what has no data yet, on the meta device, stands for the CPU."""
    return CPU if tensor.device.type == "meta" else tensor.device


def kind_of(device: torch.device) -> Device:
    return "cpu" if device.type == "cpu" else "cuda"


def device_name(device: Device) -> str:
    """`cpu`, or what the maker calls the GPU."""
    return device if device == "cpu" else torch.cuda.get_device_name()


def free_bytes(device: Device) -> int:
    return int(psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0])


def gpu_peak_bytes(device: Device) -> int | None:
    """The most that tensors took on the GPU, or None without one."""
    return None if device == "cpu" else int(torch.cuda.max_memory_allocated())


def has_triton() -> bool:
    """What compiles for a GPU, and comes with torch for CUDA."""
    return find_spec("triton") is not None
