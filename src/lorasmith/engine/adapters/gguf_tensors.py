"""From Hugging Face parameters to GGUF tensors and back: names, row order, types."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from lorasmith.errors import InvalidModel
from lorasmith.schemas.adapters import QuantizationType

# model_type -> general.architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
OUTSIDE_LAYERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# What llama.cpp reads beside the weights; a tensor without a place there would be left out in silence.
BIASED = {
    "llama": {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    "qwen2": {"attn_q", "attn_k", "attn_v"},
    "qwen3": set[str](),
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
TYPES = {"F16": GGMLQuantizationType.F16, "Q8_0": GGMLQuantizationType.Q8_0}
Q8_0_BLOCK = 32  # weights of one row that share a scale
LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class Place:
    """Where a parameter goes: its GGUF name, and the heads whose rows are interleaved (None: left as they are)."""

    name: str
    heads: int | None


def architecture(model: PreTrainedModel) -> str:
    """`general.architecture` of a model. Raises `InvalidModel` when it is not among the supported ones."""
    kind = str(model.config.model_type)
    if kind not in ARCHITECTURES:
        raise InvalidModel(
            f"GGUF export does not support the architecture {kind!r}; supported: {', '.join(sorted(ARCHITECTURES))}",
            hint="export a merged model instead, and convert it with llama.cpp",
        )
    activation = model.config.hidden_act
    if activation != "silu":
        raise InvalidModel(f"GGUF export of {kind!r} needs the activation 'silu', this model has {activation!r}")
    return ARCHITECTURES[kind]


def embedding_rows(model: PreTrainedModel) -> int:
    """Tokens that the model has logits for, which may be more than its tokenizer has."""
    rows: int = model.get_input_embeddings().weight.shape[0]  # type: ignore[assignment, index]
    return rows


def places(model: PreTrainedModel) -> Iterator[tuple[Place, Tensor]]:
    """Every parameter with its place; a tied output layer is left out, llama.cpp takes the embedding for it."""
    arch = architecture(model)
    for name, parameter in model.named_parameters():
        yield place(name, arch, model.config), parameter.detach()


def place(name: str, arch: str, config: Any) -> Place:
    module, _, suffix = name.rpartition(".")
    layer = LAYER.fullmatch(module)
    short = IN_LAYER.get(layer[2]) if layer else OUTSIDE_LAYERS.get(module)
    if short is None or (suffix == "bias" and short not in BIASED[arch]) or suffix not in {"weight", "bias"}:
        raise InvalidModel(f"GGUF has no place for the parameter {name!r} in the architecture {arch!r}")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(short)
    prefix = f"blk.{layer[1]}." if layer else ""
    return Place(f"{prefix}{short}.{suffix}", heads if arch == "llama" else None)


def interleave_heads(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head from (first halves, second halves) to (first, second) pairs, for rotary positions.

    Transformers rotates row i with row i + head_dim/2, llama.cpp's `llama` rotates neighbours.
    """
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)  # (heads · head_dim, …)


def part_heads(rows: Tensor, heads: int) -> Tensor:
    """Undo `interleave_heads`."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)  # (heads · head_dim, …)


def tensor_type(name: str, shape: torch.Size, quantization: QuantizationType) -> GGMLQuantizationType:
    """F32 for vectors and norms, F16 for rows that do not divide into blocks, else what was asked for."""
    if len(shape) == 1 or name.endswith("norm.weight"):
        return GGMLQuantizationType.F32
    if quantization == "Q8_0" and shape[-1] % Q8_0_BLOCK:
        return GGMLQuantizationType.F16
    return TYPES[quantization]


def encode_tensor(place: Place, tensor: Tensor, type: GGMLQuantizationType) -> NDArray[Any]:
    """The values of a tensor as its place wants them. Raises `InvalidModel` for what float16 cannot hold."""
    values = tensor.float().cpu()
    if place.heads is not None:
        values = interleave_heads(values, place.heads)
    largest = values.abs().max().item()
    if not largest <= (np.inf if type == GGMLQuantizationType.F32 else LARGEST_F16):  # also when it is nan
        raise InvalidModel(f"{place.name} holds {largest:g}, more than float16 can hold ({LARGEST_F16:g})")
    return np.ascontiguousarray(quantize(values.contiguous().numpy(), type))


def decode_tensor(place: Place, values: NDArray[np.float32]) -> Tensor:
    """Undo `encode_tensor`, up to the rounding; `values` are dequantised."""
    tensor = torch.from_numpy(np.array(values, dtype=np.float32))
    return tensor if place.heads is None else part_heads(tensor, place.heads)
