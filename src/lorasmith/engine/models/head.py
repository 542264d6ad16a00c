"""Cross-entropy of the trained tokens, and its gradient in the same pass, a chunk of tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from lorasmith.engine.lora.frozen import FrozenMatrix
from lorasmith.engine.models.workspace import Workspace

# Tokens: logits of 256 x 151,936 in fp32 are 156 MB. 128 take a fifth more time, 512 a tenth less. In integers all give the same bits.
CHUNK, LEAST_CHUNK, LARGE_CHUNK = 256, 128, 512


def cross_entropy(
    hidden: Tensor, targets: Tensor, head: FrozenMatrix, workspace: Workspace, chunk_tokens: int = CHUNK
) -> Tensor:
    """Sum () in nats, in fp64, of -log softmax(hidden W^T)[target] over hidden (n, H), targets (n,)."""
    nats = hidden.new_zeros((), dtype=torch.float64)
    for start in range(0, len(hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = head.forward(hidden[chunk], None, workspace, "logits")
        nats += target_softmax(logits, targets[chunk])[1]
    return nats


def cross_entropy_with_gradient(
    hidden: Tensor,
    targets: Tensor,
    head: FrozenMatrix,
    scale: float,
    workspace: Workspace,
    chunk_tokens: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The sum () in nats, in fp64, and the gradient (n, H) of `scale` times it."""
    nats, gradients = hidden.new_zeros((), dtype=torch.float64), torch.empty_like(hidden)
    for start in range(0, len(hidden), chunk_tokens):
        chunk = slice(start, start + chunk_tokens)
        logits = head.forward(hidden[chunk], None, workspace, "logits")
        gradient, chunk_nats = target_softmax(logits, targets[chunk])
        nats += chunk_nats
        torch.mul(head.backward(gradient, workspace, "dlogits"), scale, out=gradients[chunk])
    return nats, gradients


def target_softmax(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """softmax - one_hot(targets), in the place of `logits`, and the sum () of -log of the targets' probabilities.

    A probability near 1 has no digits left in bf16. What all others take, summed in fp32, has: it gives the loss and the
    gradient of a target that is nearly certain.
    """
    rows = torch.arange(len(logits), device=logits.device)
    torch.ops.aten._softmax.out(logits, -1, False, out=logits)
    certain = logits[rows, targets].to(torch.promote_types(logits.dtype, torch.float32))
    logits[rows, targets] = 0
    others = logits.sum(-1, dtype=certain.dtype)
    logits[rows, targets] = -others.to(logits.dtype)
    likelihood = torch.where(others < 0.5, torch.log1p(-others.clamp(max=0.5)), certain.log())
    return logits, -likelihood.sum()
