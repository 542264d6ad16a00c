"""Train, measure, export and talk to LoRA adapters. Names are loaded when first used; importing loads no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorasmith.engine.lora.config import LoRAConfig, LoRATargetModules
    from lorasmith.errors import LorasmithError
    from lorasmith.python.adapters import LoRAAdapter, apply_lora_adapter, load_lora_adapter, save_lora_adapter
    from lorasmith.python.memory import MemoryOptimizer, MemoryReading
    from lorasmith.python.trainer import LoRATrainer, LoRATrainingResult, ParameterStatistics

HOMES = {
    "LoRAConfig": "lorasmith.engine.lora.config",
    "LoRATargetModules": "lorasmith.engine.lora.config",
    "LorasmithError": "lorasmith.errors",
    "LoRAAdapter": "lorasmith.python.adapters",
    "save_lora_adapter": "lorasmith.python.adapters",
    "load_lora_adapter": "lorasmith.python.adapters",
    "apply_lora_adapter": "lorasmith.python.adapters",
    "MemoryOptimizer": "lorasmith.python.memory",
    "MemoryReading": "lorasmith.python.memory",
    "LoRATrainer": "lorasmith.python.trainer",
    "LoRATrainingResult": "lorasmith.python.trainer",
    "ParameterStatistics": "lorasmith.python.trainer",
}

__all__ = [
    "LoRAAdapter",
    "LoRAConfig",
    "LoRATargetModules",
    "LoRATrainer",
    "LoRATrainingResult",
    "LorasmithError",
    "MemoryOptimizer",
    "MemoryReading",
    "ParameterStatistics",
    "apply_lora_adapter",
    "load_lora_adapter",
    "save_lora_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'lorasmith' has no attribute {name!r}")
    try:
        return getattr(import_module(HOMES[name]), name)
    except ModuleNotFoundError as error:
        from lorasmith.errors import MissingExtra

        if (error.name or "").startswith("lorasmith"):
            raise
        raise MissingExtra(f"lorasmith.{name}", "train") from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
