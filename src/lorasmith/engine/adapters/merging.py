"""Folding an adapter into its base model, in float32: W + scale · B A."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import torch
from peft import PeftModel, PeftType
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from lorasmith.engine.models.loading import ADAPTER_WEIGHTS, load_adapter
from lorasmith.errors import InvalidModel
from lorasmith.files import read_json

STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def merge(model: PreTrainedModel, adapter_folder: Path) -> PreTrainedModel:
    """The model with the adapter in its weights, in float32; `model` itself is changed.

    Casting to the dtype in which the base is stored is left to the writer, so that a weight is rounded once.
    """
    return fold(attach(model, adapter_folder))


def attach(model: PreTrainedModel, adapter_folder: Path) -> PeftModel:
    """Put a LoRA adapter on a model, in float32, unfolded. Tied embeddings part if the adapter touches one of them."""
    model.to(torch.float32)  # type: ignore[arg-type]  # transformers wraps the method
    if tied(model) and touches_embeddings(model, adapter_folder):
        refuse_tied_training(adapter_folder)
        untie(model)
    wrapped = load_adapter(model, adapter_folder)
    kind = wrapped.peft_config["default"].peft_type
    if kind != PeftType.LORA:
        name = getattr(kind, "value", kind)
        raise InvalidModel(
            f"{adapter_folder} is a {name} adapter; only LORA adapters can be merged or exported",
            hint="serve it unmerged, or train a LoRA adapter",
        )
    return wrapped


def fold(wrapped: PeftModel) -> PreTrainedModel:
    """Add each B A at its scale to the weight below it. Raises `InvalidModel` when a sum is not finite."""
    try:
        merged = wrapped.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise InvalidModel(f"the adapter cannot be merged: {error}") from error
    assert isinstance(merged, PreTrainedModel)
    return merged


def touches_embeddings(model: PreTrainedModel, adapter_folder: Path) -> bool:
    """Whether the adapter has tensors of the input embedding or the output layer."""
    weights = adapter_folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        return False  # load_adapter says so with more words
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = [name for name, module in model.named_modules() if module in ends]
    with safe_open(weights, framework="pt") as stored:
        return any(f".{name}." in key for key in stored.keys() for name in names)  # noqa: SIM118  not a dict


def tied(model: PreTrainedModel) -> bool:
    """Whether the output layer and the input embedding share one weight."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def refuse_tied_training(adapter_folder: Path) -> None:
    """Raise `InvalidModel` for an adapter whose changes to one of two tied weights count for both."""
    config = read_json(adapter_folder / "adapter_config.json")
    for field in ("ensure_weight_tying", "trainable_token_indices"):
        if config.get(field):
            raise InvalidModel(
                f"{adapter_folder} changes tied embeddings together ({field} is set), which cannot be merged yet",
                hint="serve it unmerged",
            )


def untie(model: PreTrainedModel) -> None:
    """Give the output layer a weight of its own, equal to the input embedding's."""
    output = model.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}  # else transformers drops the output layer from the saved file


def stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of most stored parameters. Raises `InvalidModel` for weights stored in fewer than 16 bits."""
    if "quantization_config" in read_json(folder / "config.json"):
        raise InvalidModel(
            f"{folder} is stored quantised; an adapter is merged into full weights",
            hint="take the base model in float32, float16 or bfloat16",
        )
    parameters: Counter[str] = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            for key in stored.keys():  # noqa: SIM118  not a dict
                tensor = stored.get_slice(key)
                parameters[tensor.get_dtype()] += prod(tensor.get_shape())
    name = parameters.most_common(1)[0][0]
    if name not in STORED_DTYPES:
        raise InvalidModel(f"{folder} stores its weights as {name}; supported: {', '.join(STORED_DTYPES)}")
    return STORED_DTYPES[name]
