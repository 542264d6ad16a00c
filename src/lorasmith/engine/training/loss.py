"""Cross-entropy over the trained tokens, with the output head applied to those alone where that is exact."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lorasmith.engine.models.precision import Precision
from lorasmith.engine.training.batches import IGNORED

PROBE_TOKENS = 8
LARGE_LOGITS = 1e3  # far above where a model would cap its own


class CompletionLoss:
    """Sum of the loss in nats over trained tokens.

    The output head costs as much as several layers in a small model, and most of its rows are prompt. Where the
    model's logits are nothing but `head(decoder(ids))`, checked on a probe, only labelled rows go through the head. The probe
    is made with large logits too: a cap of them is not to be seen in the small ones of a model that is yet to be trained.
    """

    def __init__(self, model: PreTrainedModel, vocabulary_size: int, precision: Precision = "fp32") -> None:
        self.model = model
        self.decoder: nn.Module | None = getattr(model, model.base_model_prefix, None)
        self.head: nn.Module | None = model.get_output_embeddings()
        self.head_on_labels = self.head_is_last(vocabulary_size, precision)

    @torch.no_grad()
    def head_is_last(self, vocabulary_size: int, precision: Precision) -> bool:
        if self.decoder is None or self.head is None:
            return False
        device = self.model.device
        ids = torch.arange(PROBE_TOKENS, device=device).unsqueeze(0) % vocabulary_size
        training = self.model.training
        self.model.eval()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):  # some weights may be fp32
            expected = self.model(input_ids=ids, use_cache=False).logits
            hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            computed = self.head(hidden)
            factor = LARGE_LOGITS / computed.abs().max().clamp(min=1e-6)
            larger = self.head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor,))
            expected_large, large = self.model(input_ids=ids, use_cache=False).logits, self.head(hidden)
            larger.remove()
        self.model.train(training)
        return (
            expected.shape == computed.shape
            and torch.allclose(expected, computed, rtol=1e-3, atol=1e-3)
            and torch.allclose(expected_large, large, rtol=1e-3, atol=1e-3 * LARGE_LOGITS)
        )

    def __call__(self, ids: Tensor, labels: Tensor) -> Tensor:
        """ids, labels (B, T) → scalar sum in nats."""
        targets = labels[:, 1:]
        chosen = targets != IGNORED
        if self.head_on_labels and self.decoder is not None and self.head is not None:
            hidden = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            logits = self.head(hidden[:, :-1][chosen])  # (labelled tokens, V)
        else:
            logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1][chosen]
        return F.cross_entropy(logits.float(), targets[chosen], reduction="sum")
