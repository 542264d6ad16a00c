"""How the loss of rows and the gradients of the adapter are computed: by the packed decoder, or by PEFT."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.lora.dropout import RowDropout
from lorasmith.engine.models.decoder import PackedDecoder
from lorasmith.engine.models.device import device_of
from lorasmith.engine.models.elementwise import EAGER
from lorasmith.engine.models.elementwise import compiled as elementwise_compiled
from lorasmith.engine.models.families import Decoder, NotPacked, multiply_in_integers, read_decoder
from lorasmith.engine.models.packing import PackedRows, pack, token_groups
from lorasmith.engine.models.precision import Precision
from lorasmith.engine.models.prefix_cache import PrefixCache
from lorasmith.engine.training.batches import pad_batch
from lorasmith.engine.training.loss import CompletionLoss

PROBE_TOKENS = 24
# Of the largest hidden value; a wrong formula is off by far more
PROBE_TOLERANCE = {"fp32": 1e-3, "int16": 0.03, "bf16": 0.1}


class Computation(Protocol):
    """`at_once` bounds what is computed at once, in `unit`; a single row may be longer.

    `paths` counts the adapted modules by how their products are computed, `fallback` is why that is PEFT's way.
    """

    at_once: int
    unit: str
    paths: dict[str, int]
    fallback: str | None

    def micro_batches(
        self, indices: Sequence[int], rows: Sequence[RenderedExample], *, trained: bool = True
    ) -> list[list[int]]:
        """Rows of an optimizer step, or others that are not `trained`, in the parts that are computed one after the other."""
        ...

    def size(self, batch: Sequence[int], rows: Sequence[RenderedExample]) -> int:
        """How much a micro-batch is, in `unit`."""
        ...

    def limit(self, at_once: int) -> None:
        """Compute no more than that at once from now on; what was kept for more is freed."""
        ...

    def free(self) -> None:
        """Give up what is kept from one step to the next."""
        ...

    def gradients(self, indices: Sequence[int], rows: Sequence[RenderedExample], *, scale: float, step: int) -> float:
        """Add the gradient of `scale` times the summed loss of those rows to the adapter's `.grad`; returns the sum in nats.

        What is random depends on the seed, `step` and the rows alone.
        """
        ...

    def loss(self, indices: Sequence[int], rows: Sequence[RenderedExample]) -> float:
        """The summed loss in nats, without dropout."""
        ...


class PackedComputation:
    """Rows without padding, head and loss at labels alone, adapters' gradients written out."""

    def __init__(
        self,
        decoder: Decoder,
        *,
        seed: int,
        micro_batch_tokens: int,
        recompute: bool = False,
        lean: bool = False,
        compiled: bool = False,
        cache: PrefixCache | None = None,
    ) -> None:
        """`cache` belongs to the rows that `gradients` is called with."""
        elementwise = elementwise_compiled() if compiled else EAGER
        self.decoder = PackedDecoder(decoder, recompute=recompute, lean=lean, elementwise=elementwise)
        self.cache = cache
        self.seed = seed
        self.at_once, self.unit = micro_batch_tokens, "tokens"
        self.paths: dict[str, int] = dict(Counter(decoder.paths.values()))
        self.fallback: str | None = None

    def micro_batches(
        self, indices: Sequence[int], rows: Sequence[RenderedExample], *, trained: bool = True
    ) -> list[list[int]]:
        """Rows with a common beginning together, else shortest first, as long as they fit."""
        share = self.decoder.decoder.may_share
        order = sorted(indices, key=lambda index: (rows[index].ids if share else len(rows[index].ids), index))
        cache = self.cache if trained else None
        kept = [index for index in order if cache and cache.keeps(index)]
        rest = [index for index in order if not cache or not cache.keeps(index)]
        return [group for part in (kept, rest) for group in token_groups(part, rows, self.at_once, share=share)]

    def size(self, batch: Sequence[int], rows: Sequence[RenderedExample]) -> int:
        return len(pack([rows[index] for index in batch], share=self.decoder.decoder.may_share).ids)

    def limit(self, at_once: int) -> None:
        self.at_once = at_once
        self.free()

    def free(self) -> None:
        self.decoder.workspace.clear()

    def gradients(self, indices: Sequence[int], rows: Sequence[RenderedExample], *, scale: float, step: int) -> float:
        packed = pack([rows[index] for index in indices], share=self.decoder.decoder.may_share)
        dropout = RowDropout(self.seed, step, indices, packed.lengths, self.decoder.device)
        return self.decoder.gradients(packed, scale, dropout, self.prefix(packed, indices))

    def prefix(self, packed: PackedRows, indices: Sequence[int]) -> Tensor | None:
        """The stream below the lowest adapted layer: read where the cache has every row, else computed and kept."""
        if self.cache is None:
            return None
        known = [stream for index in indices if (stream := self.cache.read(index)) is not None]
        if len(known) < len(indices):
            x = self.decoder.prefix(packed)
            for index, places in zip(indices, packed.places, strict=True):
                self.cache.write(index, x[places])
            return x
        x = torch.empty(len(packed.ids), self.cache.hidden, dtype=self.cache.dtype)
        for stream, places in zip(known, packed.places, strict=True):
            x[places] = stream
        return x.to(self.decoder.device)

    def loss(self, indices: Sequence[int], rows: Sequence[RenderedExample]) -> float:
        share = not self.decoder.decoder.rotary_by_length
        return self.decoder.loss(pack([rows[index] for index in indices], share=share))


class PeftComputation:
    """Padded batches through transformers, PEFT and autograd, for whatever the packed decoder does not know."""

    def __init__(
        self,
        model: PeftModel,
        loss: CompletionLoss,
        *,
        seed: int,
        pad_id: int,
        precision: Precision,
        batch_rows: int,
        reason: str | None = None,
    ) -> None:
        """`reason` is why the packed decoder does not compute this model."""
        self.model = model
        self.completion_loss = loss
        self.seed = seed
        self.pad_id = pad_id
        self.precision = precision
        self.device = device_of(next(model.parameters()))
        self.at_once, self.unit = batch_rows, "rows"
        self.paths = {"peft": sum(isinstance(module, BaseTunerLayer) for module in model.modules())}
        self.fallback = reason

    def micro_batches(
        self, indices: Sequence[int], rows: Sequence[RenderedExample], *, trained: bool = True
    ) -> list[list[int]]:
        """Shortest first: similar lengths together need less padding."""
        order = sorted(indices, key=lambda index: (len(rows[index].ids), index))
        return [order[start : start + self.at_once] for start in range(0, len(order), self.at_once)]

    def size(self, batch: Sequence[int], rows: Sequence[RenderedExample]) -> int:
        return len(batch)

    def limit(self, at_once: int) -> None:
        self.at_once = at_once

    def free(self) -> None:
        pass

    def gradients(self, indices: Sequence[int], rows: Sequence[RenderedExample], *, scale: float, step: int) -> float:
        torch.manual_seed(hash((self.seed, step, *indices)))
        self.model.train()
        nats = self.forward(indices, rows)
        (nats * scale).backward()
        return nats.item()

    @torch.inference_mode()
    def loss(self, indices: Sequence[int], rows: Sequence[RenderedExample]) -> float:
        self.model.eval()
        return self.forward(indices, rows).item()

    def forward(self, indices: Sequence[int], rows: Sequence[RenderedExample]) -> torch.Tensor:
        ids, labels = (part.to(self.device) for part in pad_batch([rows[index] for index in indices], self.pad_id))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.completion_loss(ids, labels)


def checked_decoder(model: PeftModel, vocabulary_size: int, precision: Precision) -> Decoder:
    """The model as the packed decoder reads it, if both compute the same on a probe.

    Raises `NotPacked` with the reason; the model is then as it was.
    """
    base: nn.Module = model.get_base_model()
    ids = [(7 * index + 3) % vocabulary_size for index in range(PROBE_TOKENS)]
    decoder = read_decoder(model)
    if precision == "int16":
        multiply_in_integers(decoder)
    rows = pack([RenderedExample(0, ids, [True] * PROBE_TOKENS)])
    with torch.no_grad():
        was_training = model.training
        model.eval()
        probe = torch.tensor([ids], device=decoder.device)
        reference = base.model(input_ids=probe, use_cache=False).last_hidden_state[0]  # type: ignore[operator]
        model.train(was_training)
        packed = PackedDecoder(decoder)
        ours = packed.hidden(rows)
    difference = ((ours - reference).abs().max() / reference.abs().max()).item()
    if not difference <= PROBE_TOLERANCE[precision]:
        raise NotPacked(f"on a probe its hidden states differ from transformers' by {difference:.2g} of the largest")
    return decoder
