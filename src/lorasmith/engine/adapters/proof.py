"""Export proof: what was written is loaded again and must answer as base + adapter does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.rendering import encode, prompt_ids
from lorasmith.errors import JobFailed
from lorasmith.schemas.data import Message

PROBE_TEXTS = (
    "Once upon a time there was a small town by the sea.",
    "How do I change the address of an order that has not been shipped?",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Größe, naïve, 你好, 12345 + 67 = 12412!",
    "Answer with one word: is water wet?",
    "SELECT name, price FROM items WHERE price > 9.99 ORDER BY price;",
)


@dataclass(frozen=True)
class LogitDifference:
    """How far two sets of logits lie apart.

    `largest` is max |difference|; `relative` is that over the standard deviation of the reference's logits;
    `top1_agreement` is the share of `positions` with the same best token.
    """

    largest: float
    relative: float
    top1_agreement: float
    positions: int

    def as_check(self, bound: float) -> dict[str, Any]:
        return {**asdict(self), "relative_bound": bound}


def probe_prompts(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[list[int]]:
    """Ids of the probe prompts: as chat prompts where there is a template, and as plain text.

    `rows` is the size of the model's embedding; a probe with an id outside of it is left out.
    """
    prompts = [encode(tokenizer, text) for text in PROBE_TEXTS]
    if tokenizer.chat_template is not None:
        prompts += [prompt_ids(tokenizer, [Message(role="user", content=text)]) for text in PROBE_TEXTS]
    return [ids for ids in prompts if ids and max(ids) < rows]


@torch.inference_mode()
def probe_logits(model: nn.Module, prompts: list[list[int]]) -> Tensor:
    """Logits at every position of every prompt, (positions, V), in float32."""
    device = next(model.parameters()).device
    logits = [model(torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]
    return torch.cat(logits)  # (sum of prompt lengths, V)


def compare_logits(reference: Tensor, other: Tensor) -> LogitDifference:
    """Both are (positions, V)."""
    largest = (reference - other).abs().max().item()
    agreement = (reference.argmax(-1) == other.argmax(-1)).float().mean().item()
    return LogitDifference(largest, largest / reference.std().item(), agreement, len(reference))


def require(difference: LogitDifference, bound: float, what: str) -> None:
    """Raise `JobFailed` unless the relative difference is a number within the bound."""
    if not difference.relative <= bound:  # also when it is nan
        raise JobFailed(
            f"export proof failed: the logits of {what} differ from base + adapter by "
            f"{difference.relative:.3g} standard deviations, allowed are {bound:g}; nothing was written",
            code="export_proof_failed",
            hint="is the adapter trained on exactly this base model? Otherwise report this as a bug",
        )
