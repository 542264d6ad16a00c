"""What the packed decoder needs to know of a transformers model, read from the modules of the families that it knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from lorasmith.engine.lora.frozen import (
    FrozenMatrix,
    PackedMatrix,
    PlainMatrix,
    QuantizedMatrix,
    WidenedMatrix,
    in_integers,
)
from lorasmith.engine.lora.group import LoRAGroup, LowRank
from lorasmith.engine.lora.quantized import AsStored
from lorasmith.engine.lora.quantized_linear import QuantizedLinear
from lorasmith.engine.models.attention import Heads
from lorasmith.engine.models.device import device_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma3_text", "smollm3", "granite")
NORMS_ADD_ONE = ("gemma", "gemma3_text")  # store what is added to one
ALIKE = "all layers"  # the key of rotary positions that all layers share
SLIDING = ("mistral", "phi3")  # every layer, where the config has a window
SLIDING_BY_KIND = ("qwen2", "qwen3", "gemma3_text", "smollm3")  # the layers that `layer_types` names
BY_LENGTH = {"dynamic", "longrope"}  # rotary positions that depend on the length of a row
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class NotPacked(Exception):
    """Why a model or an adapter is not computed by the packed decoder."""


# From a tensor of the dtype to compute in and positions (1, T): cosines and sines (1, T, head_dim)
Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Layer:
    """One decoder layer. Norm weights are what the normalised input is multiplied by; q and k norms (head_dim,) or None.

    A branch, attention or MLP, is normalised once more by `branch_norms` and times `branch_scale` before it joins the stream.
    `positions` is the key of the decoder's `rotary`, None where a layer knows no positions.
    """

    first_norm: Tensor
    second_norm: Tensor
    qkv: LoRAGroup
    out: LoRAGroup
    gate_up: LoRAGroup
    down: LoRAGroup
    heads: Heads
    scale: float
    query_norm: Tensor | None
    key_norm: Tensor | None
    positions: str | None
    branch_norms: tuple[Tensor, Tensor] | None
    branch_scale: float

    @property
    def groups(self) -> list[LoRAGroup]:
        return [self.qkv, self.out, self.gate_up, self.down]

    @property
    def trained(self) -> bool:
        return any(group.updates for group in self.groups)


@dataclass
class Decoder:
    """A causal LM: embedding (V, H) times `embedding_scale`, layers, final norm, head (V, H), logits times `logit_scale`."""

    embedding: Tensor
    embedding_scale: float
    layers: list[Layer]
    final_norm: Tensor
    head: FrozenMatrix
    logit_scale: float
    eps: float
    activation: str
    rotary: dict[str, Rotary]
    rotary_by_length: bool
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        """Where its weights are, and so where a step is computed."""
        return device_of(self.final_norm)

    @property
    def groups(self) -> list[LoRAGroup]:
        return [group for layer in self.layers for group in layer.groups]

    @property
    def may_share(self) -> bool:
        """Whether rows with a common beginning may compute it once: not where a mask or a position is a row's own."""
        dropout = any(update.dropout for group in self.groups for update in group.updates)
        return not dropout and not self.rotary_by_length

    @property
    def paths(self) -> dict[str, str]:
        """Adapted module → how its frozen weight is multiplied."""
        return {update.module: group.weight.path for group in self.groups for update in group.updates}


def read_decoder(model: PeftModel) -> Decoder:
    """Describe the model, whose linear weights become views of one matrix per group: nothing is stored twice.

    Raises `NotPacked` with the reason where the family, its configuration or the adapter is not covered.
    """
    base: Any = model.get_base_model()
    config = base.config
    check(config)
    check_adapter(model)
    modules = {id(module): name for name, module in base.named_modules()}

    def group(name: str, *linears: nn.Module) -> LoRAGroup:
        return read_group(name, linears, modules)

    rotary = read_rotary(base.model.rotary_emb)
    layers = []
    for number, block in enumerate(base.model.layers):
        attention, mlp = block.self_attn, block.mlp
        if config.model_type == "phi3":
            qkv, gate_up = group("qkv", attention.qkv_proj), group("gate_up", mlp.gate_up_proj)
        else:
            qkv = group("qkv", attention.q_proj, attention.k_proj, attention.v_proj)
            gate_up = group("gate_up", mlp.gate_proj, mlp.up_proj)
        layers.append(
            Layer(
                first_norm=norm_weight(config, block.input_layernorm),
                second_norm=norm_weight(config, second_norm(block)),
                qkv=qkv,
                out=group("out", attention.o_proj),
                gate_up=gate_up,
                down=group("down", mlp.down_proj),
                heads=Heads(
                    key_heads=config.num_key_value_heads,
                    group=config.num_attention_heads // config.num_key_value_heads,
                    head_dim=attention.head_dim,
                    window=window(config, number),
                ),
                scale=float(attention.scaling),
                query_norm=norm_weight(config, attention.q_norm) if hasattr(attention, "q_norm") else None,
                key_norm=norm_weight(config, attention.k_norm) if hasattr(attention, "k_norm") else None,
                positions=positions(config, number),
                branch_norms=branch_norms(config, block),
                branch_scale=multiplier(config, "residual_multiplier"),
            )
        )
    return Decoder(
        embedding=base.model.embed_tokens.weight.detach(),
        embedding_scale=embedding_scale(config),
        layers=layers,
        final_norm=norm_weight(config, base.model.norm),
        head=head_matrix(base.lm_head),
        logit_scale=1 / multiplier(config, "logits_scaling"),
        eps=config.rms_norm_eps,
        activation=ACTIVATIONS[activation(config)],
        rotary=rotary,
        rotary_by_length=is_by_length(base.model.rotary_emb.rope_type),
        dtype=base.model.norm.weight.dtype,  # the embedding may be held in fewer bits
    )


def pack_weights(decoder: Decoder, model: PeftModel) -> None:
    """Replace every plain matrix by packed copies. The model's own linear weights are given up: it no longer runs."""
    base: Any = model.get_base_model()
    for group in decoder.groups:
        group.weight = packed_matrix(group.weight)
        for name in group.modules:
            linear = base.get_submodule(name)
            linear = getattr(linear, "base_layer", linear)
            linear.weight = nn.Parameter(linear.weight.new_empty(0), requires_grad=False)
    decoder.head = packed_matrix(decoder.head)


def multiply_in_integers(decoder: Decoder) -> None:
    """Every product with a frozen weight; nothing is copied."""
    for group in decoder.groups:
        group.weight = in_integers(group.weight)
    decoder.head = in_integers(decoder.head)


def packing_bytes(decoder: Decoder) -> int:
    """Memory that packing takes on top: a second copy of the layers' weights, and two of the head's, which the embedding keeps."""
    matrices = [*(group.weight for group in decoder.groups), decoder.head, decoder.head]
    return sum(matrix.weight.nbytes for matrix in matrices if isinstance(matrix, PlainMatrix))


def packed_matrix(matrix: FrozenMatrix) -> FrozenMatrix:
    return PackedMatrix(matrix.weight) if isinstance(matrix, PlainMatrix) else matrix


def check(config: Any) -> None:
    if config.model_type not in FAMILIES:
        raise NotPacked(f"the family {config.model_type!r} is not one of {', '.join(FAMILIES)}")
    if activation(config) not in ACTIVATIONS:
        raise NotPacked(f"the activation {activation(config)!r} is not known")
    for name in ("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            raise NotPacked(f"the model's own {name} is {getattr(config, name)}")
    if getattr(config, "use_bidirectional_attention", None):
        raise NotPacked("attention is not causal")


def check_adapter(model: PeftModel) -> None:
    """Only low-rank updates of linear layers are computed; whatever else trains needs PEFT."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_A." not in name and ".lora_B." not in name:
            raise NotPacked(f"{name} is trained, which is no low-rank update")
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        if type(module) is not PeftLinear or type(module.base_layer) not in (nn.Linear, QuantizedLinear):
            raise NotPacked(f"{name} is a {type(module.get_base_layer()).__name__}, not a plain linear layer")
        if module.lora_variant:
            raise NotPacked(f"{name} uses a variant of LoRA")
        if name.endswith(".lm_head"):
            raise NotPacked("the output head is adapted")


def read_group(name: str, linears: tuple[nn.Module, ...], modules: dict[int, str]) -> LoRAGroup:
    """Join the weights of linear layers that read one input."""
    bases: list[Any] = [getattr(linear, "base_layer", linear) for linear in linears]
    biases = [base.bias for base in bases]
    if any(bias is None for bias in biases):
        bias = None
        if any(bias is not None for bias in biases):
            raise NotPacked(f"only some of {name} have a bias")
    else:
        bias = torch.cat([base.bias.detach() for base in bases])
    updates, start = [], 0
    for linear, base in zip(linears, bases, strict=True):
        columns = slice(start, start + base.out_features)
        start = columns.stop
        if isinstance(linear, PeftLinear):
            updates += read_updates(linear, modules[id(linear)], columns)
    return LoRAGroup(name, frozen_matrix(name, bases), bias, [modules[id(linear)] for linear in linears], updates)


def head_matrix(head: nn.Linear) -> FrozenMatrix:
    if isinstance(head, QuantizedLinear) and isinstance(head.stored, AsStored):
        return WidenedMatrix(head.stored.values)
    return PlainMatrix(head.weight.detach())


def frozen_matrix(name: str, bases: list[Any]) -> FrozenMatrix:
    quantized = [base.stored for base in bases if isinstance(base, QuantizedLinear)]
    if not quantized:
        return PlainMatrix(join_weights(bases))
    if len(quantized) < len(bases):
        raise NotPacked(f"only some of {name} are quantised")
    return QuantizedMatrix(quantized)


def join_weights(bases: list[Any]) -> Tensor:
    """One matrix (Σ out, in) whose rows the layers' own weights then view, so that nothing is stored twice."""
    if len(bases) == 1:
        weight: Tensor = bases[0].weight.detach()
        return weight
    joined = torch.cat([base.weight.detach() for base in bases])
    for base, rows in zip(bases, joined.split([base.out_features for base in bases]), strict=True):
        base.weight = nn.Parameter(rows, requires_grad=False)
    return joined


def read_updates(linear: Any, module: str, columns: slice) -> list[LowRank]:
    adapters = [name for name in linear.active_adapters if name in linear.lora_A]
    if len(adapters) != 1:
        raise NotPacked(f"{module} has {len(adapters)} active adapters")
    name = adapters[0]
    dropout = linear.lora_dropout[name]
    return [
        LowRank(
            module=module,
            columns=columns,
            A=linear.lora_A[name].weight,
            B=linear.lora_B[name].weight,
            scale=linear.scaling[name],
            dropout=float(getattr(dropout, "p", 0.0)),
        )
    ]


def norm_weight(config: Any, norm: Any) -> Tensor:
    weight: Tensor = norm.weight.detach()
    return weight + 1 if config.model_type in NORMS_ADD_ONE else weight


def second_norm(block: Any) -> Any:
    """That in front of the MLP, which most families call after what is before it."""
    return getattr(block, "pre_feedforward_layernorm", block.post_attention_layernorm)


def branch_norms(config: Any, block: Any) -> tuple[Tensor, Tensor] | None:
    """Behind attention and MLP, where a family has them."""
    if not hasattr(block, "pre_feedforward_layernorm"):
        return None
    return norm_weight(config, block.post_attention_layernorm), norm_weight(config, block.post_feedforward_layernorm)


def embedding_scale(config: Any) -> float:
    if config.model_type in ("gemma", "gemma3_text"):
        return float(config.hidden_size**0.5)
    return multiplier(config, "embedding_multiplier")


def multiplier(config: Any, name: str) -> float:
    """Of Granite alone: a config may hold fields of another family, which transformers does not read."""
    return float(getattr(config, name)) if config.model_type == "granite" else 1.0


def activation(config: Any) -> str:
    name: str = config.hidden_activation if config.model_type == "gemma3_text" else config.hidden_act
    return name


def read_rotary(module: Any) -> dict[str, Rotary]:
    """By kind of layer where the module has several."""
    if isinstance(module.rope_type, dict):
        return {kind: partial(module, layer_type=kind) for kind in module.rope_type}
    return {ALIKE: module}


def is_by_length(rope_type: str | dict[str, str]) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return not BY_LENGTH.isdisjoint(kinds)


def positions(config: Any, layer: int) -> str | None:
    """The key of the decoder's `rotary`: a kind of layer where each has its own, None where a layer has none."""
    if config.model_type == "smollm3" and not config.no_rope_layers[layer]:
        return None
    return str(config.layer_types[layer]) if config.model_type == "gemma3_text" else ALIKE


def window(config: Any, layer: int) -> int | None:
    """Tokens that a layer sees back, itself included, or None for all: also where the config of another family has a window."""
    by_kind = config.model_type in SLIDING_BY_KIND and config.layer_types[layer] == "sliding_attention"
    return config.sliding_window or None if by_kind or config.model_type in SLIDING else None
