"""A run before it starts: its rows, its steps, its model without weights, and what it would choose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasmith.engine.data.parts import RenderedPart, render_part
from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.lora.config import LoRAConfig, fit
from lorasmith.engine.lora.quantized import AS_STORED, Quantization
from lorasmith.engine.lora.quantized_linear import quantized_bytes, quantized_elements
from lorasmith.engine.models.families import FAMILIES, Decoder, NotPacked, packing_bytes, read_decoder
from lorasmith.engine.models.precision import DTYPES, SPARE_SHARE, Memory, Precision, choose_memory, choose_precision
from lorasmith.engine.training.batches import StepPlan, plan_steps
from lorasmith.engine.training.checkpoints import trainable
from lorasmith.engine.training.choices import choose_compile, saves_memory, weights_of
from lorasmith.engine.training.computation import Computation, PeftComputation
from lorasmith.engine.training.devices import Devices
from lorasmith.engine.training.estimation.skeleton import (
    StoredWeights,
    adapted_skeleton,
    quantize_skeleton,
    skeleton,
    stored_weights,
)
from lorasmith.engine.training.estimation.untouched import UntouchedComputation
from lorasmith.engine.training.loss import CompletionLoss
from lorasmith.schemas.data import Example, TooLong
from lorasmith.schemas.training import TrainingSpec


@dataclass
class Material:
    """What does not depend on how the run is set. `rendered` keeps the rows of each length limit."""

    config: Any
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    stop_ids: set[int]
    train: list[Example]
    validation: list[Example]
    rendered: dict[tuple[int, str], tuple[RenderedPart, Sequence[RenderedExample]]] = field(default_factory=dict)

    def rows(self, spec: TrainingSpec, too_long: TooLong) -> tuple[RenderedPart, Sequence[RenderedExample]]:
        """The train part and the validation rows that fit."""
        context = getattr(self.config, "max_position_embeddings", None) or spec.training.max_seq_length
        limit = min(spec.training.max_seq_length, context)
        if (limit, too_long) not in self.rendered:
            allow = spec.training.allow
            part = render_part(
                self.tokenizer, self.train, self.stop_ids, max_tokens=limit, too_long=too_long, allow=allow
            )
            checked: Sequence[RenderedExample] = []
            if self.validation:
                checked = render_part(
                    self.tokenizer,
                    self.validation,
                    self.stop_ids,
                    max_tokens=limit,
                    too_long="drop",
                    allow=allow,
                    may_be_empty=True,
                ).rows
            self.rendered[limit, too_long] = part, checked
        return self.rendered[limit, too_long]


@dataclass
class RunShape:
    """A run as it would be computed. `decoder` is None where it goes through PEFT, and `why_peft` says why."""

    spec: TrainingSpec
    folder: Path
    lora: LoRAConfig
    part: RenderedPart
    validation: Sequence[RenderedExample]
    plan: StepPlan
    precision: Precision
    base: PreTrainedModel
    model: PeftModel
    stored: StoredWeights
    decoder: Decoder | None
    why_peft: str | None
    quantization: Quantization | None  # or how the base is held otherwise in fewer bits
    memory: Memory
    compiled: bool
    step_bytes: int | None = None  # once it has been rehearsed

    @property
    def processes(self) -> int:
        return self.spec.training.processes

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def is_lean(self) -> bool:
        settings, is_stored = self.spec.training, self.quantization == AS_STORED
        return saves_memory(settings, self.precision, is_stored=is_stored)

    @property
    def layers(self) -> int:
        return int(self.base.config.num_hidden_layers)

    @property
    def lowest(self) -> int:
        """Number of the lowest layer that an adapter is on."""
        if self.decoder is None:
            return 0
        return next((number for number, layer in enumerate(self.decoder.layers) if layer.trained), 0)

    @property
    def trained_elements(self) -> int:
        return sum(parameter.numel() for parameter in trainable(self.model).values())

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.base_parameters()) + quantized_elements(self.base)

    def base_parameters(self) -> Iterator[torch.Tensor]:
        trained = {id(parameter) for parameter in trainable(self.model).values()}
        return (parameter for parameter in self.model.parameters() if id(parameter) not in trained)

    @property
    def weight_bytes(self) -> int:
        """Of the frozen model, quantised or in the dtype of the run."""
        full = sum(parameter.nbytes for parameter in self.base_parameters())
        return full + quantized_bytes(self.base)

    def computation(self, decoder: Decoder | None = None, model: PeftModel | None = None) -> Computation:
        """To be rehearsed, without compiled parts; of this run, or of another number of layers."""
        settings = self.spec.training
        if self.decoder is not None:
            return UntouchedComputation(
                decoder or self.decoder,
                seed=settings.seed,
                micro_batch_tokens=settings.micro_batch_tokens,
                recompute=settings.gradient_checkpointing,
                lean=self.is_lean,
            )
        return PeftComputation(
            model or self.model,
            unprobed_loss(model or self.model),
            seed=settings.seed,
            pad_id=0,
            precision=self.precision,
            batch_rows=settings.batch_size,
        )


def unprobed_loss(model: PeftModel) -> CompletionLoss:
    """The loss of a model without weights, whose head is taken to be all that stands behind the decoder."""
    loss = CompletionLoss.__new__(CompletionLoss)
    base: Any = model.get_base_model()
    loss.model = base
    loss.decoder = getattr(base, base.base_model_prefix, None)
    loss.head = base.get_output_embeddings()
    loss.head_on_labels = loss.decoder is not None and loss.head is not None
    return loss


def shape_run(
    material: Material, spec: TrainingSpec, like: RunShape | None = None, devices: Devices | None = None
) -> RunShape:
    """`like`: what is chosen by measuring stays as it is there, and rows above a lower limit are left out.

    `devices`: the processes that shape this run at a time; all choose what the first one does.
    """
    devices = devices or Devices()
    settings = spec.training
    too_long: TooLong = settings.too_long
    if like and settings.max_seq_length < like.spec.training.max_seq_length:
        too_long = "drop"
    part, validation = material.rows(spec, too_long)
    precision: Precision
    if like and settings.precision == "auto":
        precision = like.precision
    else:
        precision = devices.found_by_first(lambda: choose_precision(settings.precision))
    base = skeleton(material.config, DTYPES[precision])
    stored = stored_weights(material.folder, material.config, base)
    quantization = Quantization.named(settings.quantization, settings.double_quantization)
    half = stored.half_bytes if material.config.model_type in FAMILIES else 0
    if quantization is None:
        weights = devices.found_by_first(lambda: weights_of(spec, precision, half * settings.processes))
        quantization = AS_STORED if weights == "stored" else None
    if quantization:
        quantize_skeleton(base, quantization, material.folder)
    lora = fit(LoRAConfig(r=spec.lora.rank, **spec.lora.model_dump(exclude={"rank"})), base)
    model = adapted_skeleton(base, lora)
    decoder, why_peft = None, None
    try:
        decoder = read_decoder(model)
    except NotPacked as reason:
        why_peft = str(reason)
    shape = RunShape(
        spec=spec,
        folder=material.folder,
        lora=lora,
        part=part,
        validation=validation,
        plan=plan_steps(
            len(part.rows),
            batch_size=settings.batch_size,
            accumulation=settings.gradient_accumulation_steps,
            epochs=settings.num_epochs,
            max_steps=settings.max_steps,
            seed=settings.seed,
        ),
        precision=precision,
        base=base,
        model=model,
        stored=stored,
        decoder=decoder,
        why_peft=why_peft,
        quantization=quantization,
        memory="lean",
        compiled=False,
    )
    if decoder is not None:
        adapted = decoder  # known to be one in what is called later too
        if like and settings.memory == "auto":
            shape.memory = like.memory
        else:
            shape.memory = devices.found_by_first(lambda: memory_mode(shape, adapted))
        if like:
            shape.compiled = like.compiled
        else:
            shape.compiled = devices.found_by_first(lambda: choose_compile(settings, adapted, part.rows)) == "on"
    return shape


def memory_mode(shape: RunShape, decoder: Decoder) -> Memory:
    """As the run chooses once its weights are loaded, which takes from what is free now."""
    extra = packing_bytes(decoder) + round(SPARE_SHARE * shape.weight_bytes)
    wanted = "lean" if shape.is_lean else shape.spec.training.memory
    return choose_memory(wanted, shape.precision, extra * shape.processes)
