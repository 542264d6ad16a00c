"""Adapters in Python: save, load and apply them, in the caller's own process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import PreTrainedModel

from lorasmith.engine.lora.config import LoRAConfig, fit
from lorasmith.engine.models.loading import load_adapter
from lorasmith.errors import InvalidModel, NotFound
from lorasmith.files import read_json, staged_folder, write_json
from lorasmith.schemas.training import InitialWeights

METADATA = "lorasmith.json"


@dataclass
class LoRAAdapter:
    """An adapter's identity: what it is called, which base it belongs to and how it was configured.

    `path` is the PEFT folder that holds its weights, once it has been saved or loaded.
    """

    adapter_id: str
    base_model_name: str
    config: LoRAConfig = field(default_factory=LoRAConfig)
    metadata: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None


def save_lora_adapter(adapter: LoRAAdapter, path: Path | str, peft_model: PeftModel) -> Path:
    """Write a PEFT folder whole or not at all, with the adapter's identity beside the weights."""
    target = Path(path)
    with staged_folder(target, replace=True) as folder:
        peft_model.save_pretrained(str(folder), save_embedding_layers=False)
        write_json(
            folder / METADATA,
            {
                "adapter_id": adapter.adapter_id,
                "base_model_name": adapter.base_model_name,
                "config": adapter.config.to_dict(),
                "metadata": adapter.metadata,
            },
        )
    adapter.path = target
    return target


def load_lora_adapter(path: Path | str, base_model: PreTrainedModel) -> LoRAAdapter:
    """Read an adapter folder and check that it fits `base_model`, which stays as it is.

    Raises `NotFound` without a folder and `InvalidModel` when a tensor is missing or has another shape.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise NotFound(f"no adapter folder {folder}")
    check_fit(folder, base_model)
    stored = read_json(folder / "adapter_config.json")
    identity = read_json(folder / METADATA) if (folder / METADATA).is_file() else {}
    return LoRAAdapter(
        adapter_id=identity.get("adapter_id", folder.name),
        base_model_name=identity.get("base_model_name", stored.get("base_model_name_or_path") or "unknown"),
        config=LoRAConfig.from_dict(identity["config"]) if identity else read_peft_config(stored),
        metadata=identity.get("metadata", {}),
        path=folder,
    )


def read_peft_config(stored: dict[str, Any]) -> LoRAConfig:
    """Our config of an `adapter_config.json`; PEFT keeps target modules as a set, so they come back sorted."""
    targets, layers = stored["target_modules"], stored.get("layers_to_transform")
    init: Any = stored.get("init_lora_weights")
    return LoRAConfig(
        r=stored["r"],
        alpha=stored["lora_alpha"],
        dropout=stored["lora_dropout"],
        target_modules=targets if isinstance(targets, str) else sorted(targets),
        use_rslora=stored.get("use_rslora", False),
        use_dora=stored.get("use_dora", False),
        rank_pattern=stored.get("rank_pattern") or {},
        alpha_pattern=stored.get("alpha_pattern") or {},
        layers=[layers] if isinstance(layers, int) else layers,
        modules_to_save=stored.get("modules_to_save") or [],
        init=init if init in get_args(InitialWeights) else "default",
    )


def check_fit(folder: Path, base_model: PreTrainedModel) -> None:
    """Each adapter tensor needs a layer of its shape in the base."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file() or not (folder / "adapter_config.json").is_file():
        raise InvalidModel(
            f"{folder} is not a PEFT adapter: adapter_config.json or adapter_model.safetensors is missing"
        )
    modules, parameters = dict(base_model.named_modules()), dict(base_model.named_parameters(remove_duplicate=False))
    with safe_open(weights, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118  safe_open is no mapping
            name, side, _ = f"{key.removeprefix('base_model.model.')}.".partition(".lora_")
            shape = tensors.get_slice(key).get_shape()
            if side:
                layer = modules.get(name)
                expected: Any = getattr(layer, "in_features" if ".lora_A." in key else "out_features", None)
                found: Any = shape[1 if ".lora_A." in key else 0]
            else:  # a module that was trained whole
                name = name.rstrip(".")
                layer = parameters.get(name)
                expected, found = None if layer is None else list(layer.shape), shape
            if expected != found:
                raise InvalidModel(
                    f"{folder} does not fit this base: {key} has shape {shape}, the layer {name!r} "
                    f"{'does not exist' if layer is None else f'has {expected}'}",
                    hint="the adapter was trained on another base model",
                )


def apply_lora_adapter(base_model: PreTrainedModel, adapter: LoRAAdapter) -> PeftModel:
    """The base with the adapter's weights on it; for an adapter without weights, a fresh one ready for training."""
    if adapter.path is not None:
        return load_adapter(base_model, adapter.path)
    model = get_peft_model(base_model, fit(adapter.config, base_model).to_peft_config())
    assert isinstance(model, PeftModel)
    return model
