"""The model of a run without its weights: shapes from the config, sizes on disk from the safetensors headers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lorasmith.engine.lora.config import LoRAConfig, fit, pattern_of
from lorasmith.engine.lora.quantized import AS_STORED, Quantization
from lorasmith.engine.lora.quantized_linear import QuantizedLinear
from lorasmith.engine.lora.targets import is_target
from lorasmith.engine.models.families import Decoder
from lorasmith.engine.models.quantized_loading import ends_of, linears_to_quantize, widen_ends
from lorasmith.engine.training.checkpoints import trainable
from lorasmith.engine.training.estimation.untouched import untouched_weight
from lorasmith.errors import InvalidModel
from lorasmith.model_files import safetensors_header

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredWeights:
    """Bytes of the weights on disk by dtype; read from the headers, or from the config where there are no weights."""

    bytes_by_dtype: Mapping[torch.dtype, int]
    largest_bytes: int  # of one tensor

    @property
    def file_bytes(self) -> int:
        return sum(self.bytes_by_dtype.values())

    @property
    def half_bytes(self) -> int:
        return self.bytes_by_dtype.get(torch.bfloat16, 0) + self.bytes_by_dtype.get(torch.float16, 0)

    def mapped(self, dtype: torch.dtype) -> bool:
        """Whether the run reads them in place: what has its dtype already is mapped, not copied."""
        return set(self.bytes_by_dtype) == {dtype}


def read_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError) as error:
        raise InvalidModel(f"{folder}/config.json describes no model that transformers knows: {error}") from error


def stored_weights(folder: Path, config: Any, base: PreTrainedModel) -> StoredWeights:
    found: dict[torch.dtype, int] = {}
    largest = 0
    for path in sorted(folder.glob("*.safetensors")):
        for entry in safetensors_header(path).values():
            dtype = STORED_DTYPES.get(entry["dtype"], torch.uint8)
            size = entry["data_offsets"][1] - entry["data_offsets"][0]
            found[dtype] = found.get(dtype, 0) + size
            largest = max(largest, size)
    if not found:
        dtype = getattr(config, "dtype", None) or torch.float32
        sizes = [parameter.numel() * dtype.itemsize for parameter in base.parameters()]
        found[dtype], largest = sum(sizes), max(sizes)
    return StoredWeights(found, largest)


def shortened(config: Any, layers: int) -> Any:
    """The config with so many layers of the same shape."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    return config


def skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device: modules and shapes, no weights."""
    try:
        with torch.device("meta"):
            own = copy.deepcopy(config)  # which takes on the dtype; the file's own is asked for later
            model: PreTrainedModel = AutoModelForCausalLM.from_config(own, dtype=dtype)
    except (ValueError, KeyError) as error:
        raise InvalidModel(f"a {config.model_type!r} is no causal language model: {error}") from error
    return model


def quantize_skeleton(base: PreTrainedModel, quantization: Quantization, folder: Path) -> None:
    """Make its linear layers those of a quantised base, as `load_quantized_model` does; raises what that raises."""
    for name, linear in linears_to_quantize(base, folder).items():
        shape = linear.out_features, linear.in_features
        with torch.device("meta"):
            quantized = QuantizedLinear(
                partial(torch.empty, shape),
                linear.bias,
                quantization,
                linear.weight.dtype,
                untouched_weight(shape, quantization),
            )
        base.set_submodule(name, quantized)
    if quantization == AS_STORED:
        narrow_ends(base)
        widen_ends(base, base.dtype)


def narrow_ends(model: PreTrainedModel) -> None:
    """Put embedding and output head into 16 bits, as they are on disk."""
    for end in ends_of(model):
        if end is not None:
            end.weight.data = end.weight.data.bfloat16()


def adapted_skeleton(base: PreTrainedModel, lora: LoRAConfig) -> PeftModel:
    """With an adapter on it, on the meta device. `lora` has the names of the model's modules (`fit`)."""
    base.requires_grad_(False)
    model = get_peft_model(base, replace(lora, init="default").to_peft_config(), low_cpu_mem_usage=True)
    assert isinstance(model, PeftModel)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.float()
    return model


def fitted(lora: LoRAConfig, base: PreTrainedModel) -> LoRAConfig:
    """`fit` for a model with fewer layers: what names a layer that is not there is left out."""
    names = [name for name, _ in base.named_modules()]

    def there(patterns: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in patterns.items() if any(pattern_of(name, [key]) for name in names)}

    return fit(
        replace(
            lora,
            layers=None,
            target_modules=[
                target for target in lora.target_modules if any(is_target(name, [target]) for name in names)
            ],
            rank_pattern=there(lora.rank_pattern),
            alpha_pattern=there(lora.alpha_pattern),
        ),
        base,
    )


def lend_memory(model: PeftModel) -> None:
    """Give the trained weights of a skeleton, and their gradients, memory that is never touched."""
    for name, parameter in trainable(model).items():
        module_name, _, own = name.rpartition(".")
        given = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype))
        given.grad = torch.empty_like(given)
        model.get_submodule(module_name)._parameters[own] = given


def few_layers(decoder: Decoder, count: int) -> Decoder:
    """The decoder with `count` of the layers from the lowest adapted one on, and one of those below it."""
    lowest = next((number for number, layer in enumerate(decoder.layers) if layer.trained), 0)
    below, rest = decoder.layers[:lowest][-1:], decoder.layers[lowest:]
    return replace(decoder, layers=[*below, rest[0], *rest[1:][len(rest) - count :]])


def layer_weights(base: PreTrainedModel, layers: int) -> int:
    """Elements of the matrices of one decoder layer, adapters aside."""
    head = base.get_output_embeddings()
    linear = [
        module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    ]
    return sum(module.in_features * module.out_features for module in linear) // layers
