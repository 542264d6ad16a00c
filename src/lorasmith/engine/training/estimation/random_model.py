"""A few random layers of a run's shape, to be measured; a quantised base is one of quantised noise."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from lorasmith.engine.lora.quantized import (
    AS_STORED,
    BLOCK,
    AsStored,
    Blocks,
    Magnitudes,
    Quantization,
    QuantizedWeight,
    Rows,
    quantize,
    quantize_magnitudes,
)
from lorasmith.engine.lora.quantized_linear import QuantizedLinear
from lorasmith.engine.models.quantized_loading import linears_to_quantize, widen_ends
from lorasmith.engine.reporting import SilentReporter
from lorasmith.engine.training.estimation.shape import RunShape
from lorasmith.engine.training.estimation.skeleton import fitted, narrow_ends, shortened
from lorasmith.engine.training.run import adapted

NOISE = torch.Size([1 << 20])


def random_model(shape: RunShape, layers: int, vocabulary: int, folder: Path) -> PeftModel:
    """So many layers of the run's shape, adapted as in the run."""
    config = shortened(shape.base.config, layers)
    config.vocab_size = vocabulary
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        setattr(config, name, None)  # they may lie beyond a smaller vocabulary
    torch.manual_seed(0)
    with no_init_weights():
        base = AutoModelForCausalLM.from_config(config, dtype=shape.dtype)
    if shape.quantization:
        quantize_noise(base, shape.quantization, shape.folder)
    fill(base)
    lora = shape.lora if layers == shape.layers else fitted(shape.lora, base)
    return adapted(base, replace(lora, init="default"), folder, SilentReporter(folder))[0]


class Vocabulary:
    """Of a tokenizer, what a computation asks for, cut to the size of the small model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        self.pad_token_id = min(int(tokenizer.pad_token_id or 0), size - 1)
        self.size = min(size, len(tokenizer))

    def __len__(self) -> int:
        return self.size


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Weights of the usual size, from one block of noise: drawing billions would take longer than the measuring."""
    noise = torch.randn(NOISE) * 0.02
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        flat = parameter.view(-1)
        for start in range(0, len(flat), len(noise)):
            part = flat[start : start + len(noise)]
            part.copy_(noise[: len(part)])


def quantize_noise(model: PreTrainedModel, quantization: Quantization, folder: Path) -> None:
    """Linear layers of one block of quantised noise: quantising billions of weights would take longer than the measuring."""
    noise = torch.randn(1, NOISE.numel()) * 0.02
    stored_as_is = quantization == AS_STORED
    tile = quantize(noise.bfloat16() if stored_as_is else noise, replace(quantization, double=False))
    for name, linear in linears_to_quantize(model, folder).items():
        shape = linear.out_features, linear.in_features
        stored = tiled(tile, shape, double=quantization.double)
        read_full = partial(torch.empty, shape)  # what reads it, another start than `default`, is not measured
        model.set_submodule(name, QuantizedLinear(read_full, linear.bias, quantization, linear.weight.dtype, stored))
    if stored_as_is:
        computed_in = model.dtype
        narrow_ends(model)
        fill(model)
        widen_ends(model, computed_in)


def tiled(tile: QuantizedWeight, shape: tuple[int, int], *, double: bool) -> QuantizedWeight:
    """A weight (out, in) whose codes and scales are those of `tile`, again and again."""
    elements = prod(shape)
    if isinstance(tile, AsStored):
        return AsStored(again(tile.values, elements).view(shape))
    if isinstance(tile, Rows):
        return Rows(again(tile.codes, elements).view(shape), tile.scales.expand(shape[0], 1).contiguous())
    assert isinstance(tile, Blocks)
    blocks = -(-elements // BLOCK)
    magnitudes = again(tile.magnitudes.values, blocks)
    return Blocks(
        shape,
        tile.kind,
        again(tile.codes, BLOCK // 2 * blocks),
        quantize_magnitudes(magnitudes) if double else Magnitudes(magnitudes),
    )


def again(values: Tensor, count: int) -> Tensor:
    """`count` values: those of `values`, again from the beginning. A copy beside them would be taken for libraries' memory."""
    flat = values.reshape(-1)
    made = flat.new_empty(count)
    for part in made.split(len(flat)):
        part.copy_(flat[: len(part)])
    return made
