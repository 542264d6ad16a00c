"""A model whose linear layers are held in fewer bits, each from when it is read: its full weights are never in memory together."""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from lorasmith.engine.lora.quantized import AS_STORED, AsStored, Quantization
from lorasmith.engine.lora.quantized_linear import QuantizedLinear, WidenedEmbedding
from lorasmith.engine.models.device import CPU
from lorasmith.engine.models.families import FAMILIES
from lorasmith.errors import InvalidModel
from lorasmith.files import read_json
from lorasmith.model_files import safetensors_header

WAY_OUT = "train on the base as it is: training.quantization=none"


class StoredWeights:
    """The tensors of a model folder by name. Each read opens its file anew: its pages go with the tensor."""

    def __init__(self, folder: Path, model: PreTrainedModel, device: torch.device) -> None:
        self.prefix = f"{model.base_model_prefix}."  # the decoder's, which a checkpoint without output head leaves out
        self.device = device
        self.places: dict[str, tuple[Path, str]] = {}
        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as stored:
                keys = stored.keys()
            self.places |= {rename_source_key(key, renamings, [])[0]: (path, key) for key in keys}

    def place(self, name: str) -> tuple[Path, str] | None:
        """The file with the parameter `name` and what it is called there, or None where it is not there."""
        return self.places.get(name) or self.places.get(name.removeprefix(self.prefix))

    def read(self, name: str, shape: torch.Size) -> Tensor:
        """On a CPU a view of the file, which stays mapped while it is there. Raises `InvalidModel` for another shape."""
        place = self.place(name)
        assert place is not None
        path, key = place
        with safe_open(path, framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(key)
        if tensor.shape != shape:
            raise InvalidModel(
                f"{path}: {key} has the shape {tuple(tensor.shape)}, its config.json says {tuple(shape)}"
            )
        return tensor.to(self.device)


def load_quantized_model(
    folder: Path, dtype: torch.dtype, quantization: Quantization, device: torch.device = CPU
) -> PreTrainedModel:
    """A causal LM in eval mode. Linear layers but the output head are quantised, on `device`; the rest is in `dtype`.

    `AS_STORED` leaves embedding and output head as they are on disk too: they are small in a large model, and half of a small one.

    Raises `InvalidModel` for a weight that is missing, and for one that would have to stay as large as it is.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise InvalidModel(f"{folder} is stored quantised already", hint=WAY_OUT)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, KeyError, RuntimeError) as error:
        raise InvalidModel(f"{folder} cannot be loaded as a causal language model: {error}") from error
    linears = linears_to_quantize(model, folder)
    ends = {name for name, module in model.named_modules() if module in ends_of(model)}
    stored = StoredWeights(folder, model, device)
    missing = missing_weights(model, stored, folder)
    for name, place in model.state_dict().items():
        layer, _, own = name.rpartition(".")
        if layer in linears and own == "weight":
            linear = linears[layer]
            read_full = partial(stored.read, name, place.shape)
            model.set_submodule(layer, QuantizedLinear(read_full, linear.bias, quantization, dtype))
        elif name not in missing:
            value = stored.read(name, place.shape)
            end = quantization == AS_STORED and layer in ends
            fill(model, name, value.clone() if end else value.to(place.dtype, copy=True))
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if quantization == AS_STORED:
        widen_ends(model, dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.to(device)  # type: ignore[arg-type]  # buffers; weights are there
    model.eval()
    return model


def ends_of(model: PreTrainedModel) -> tuple[nn.Module | None, nn.Module | None]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def widen_ends(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let embedding and output head give `dtype` while their weights, which they may share, stay as they are."""
    embedding, head = ends_of(model)
    assert isinstance(embedding, nn.Embedding)
    if isinstance(head, nn.Linear):
        values, bias = head.weight.data, None if head.bias is None else head.bias.data.to(dtype)
        stored = AsStored(values, shared=head.weight is embedding.weight)
        widened = QuantizedLinear(lambda: values, bias, AS_STORED, dtype, stored)
        model.set_output_embeddings(widened)
    model.set_input_embeddings(WidenedEmbedding(embedding, dtype))


def half_bytes(folder: Path) -> int:
    """Bytes of the matrices that a model folder has in bf16 or fp16, if all its large weights are known to be such matrices."""
    config = read_json(folder / "config.json")
    if config.get("model_type") not in FAMILIES or "quantization_config" in config:
        return 0
    return sum(
        2 * prod(entry["shape"])
        for path in folder.glob("*.safetensors")
        for entry in safetensors_header(path).values()
        if entry["dtype"] in ("BF16", "F16") and len(entry["shape"]) == 2
    )


def linears_to_quantize(model: PreTrainedModel, folder: Path) -> dict[str, nn.Linear]:
    """Every linear layer but the output head, by name, if all large weights are in them, in embeddings and in the head."""
    head = model.get_output_embeddings()
    linears = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and module is not head
    }
    for name, module in model.named_modules():
        if name in linears or module is head or isinstance(module, nn.Embedding):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim > 1:
                raise InvalidModel(
                    f"{folder} cannot be quantised: {name}.{parameter_name} is part of a {type(module).__name__}, "
                    "and only linear layers can be stored in fewer bits",
                    hint=WAY_OUT,
                )
    return linears


def missing_weights(model: PreTrainedModel, stored: StoredWeights, folder: Path) -> set[str]:
    """Names that the folder leaves out because they are tied to others. Raises `InvalidModel` for any other."""
    missing = {name for name in model.state_dict() if stored.place(name) is None}
    pairs = model.all_tied_weights_keys.items()
    elsewhere = {name for pair in pairs for name in pair if not missing.issuperset(pair)}
    lost = sorted(missing - elsewhere)
    if lost:
        raise InvalidModel(f"{folder} lacks {len(lost)} weights, the first is {lost[0]!r}", hint=WAY_OUT)
    return missing


def fill(model: PreTrainedModel, name: str, value: Tensor) -> None:
    """Make `value` the parameter or buffer `name`."""
    parent, _, own = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, own, nn.Parameter(value, requires_grad=False) if own in module._parameters else value)
