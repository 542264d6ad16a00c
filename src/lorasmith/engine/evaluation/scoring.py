"""How likely a model finds the expected answers: teacher-forced loss and token accuracy, per example."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.models.generation import LanguageModel, unwrapped
from lorasmith.errors import Interrupted, InvalidData, InvalidModel

TOKENS_PER_BATCH = 8192  # padded
LOGITS_PER_BATCH = 2**26  # 256 MB of float32


@dataclass(frozen=True)
class Score:
    """Over the trained tokens of one example: nats in total, how many were ranked first, how many there are."""

    nats: float
    correct: int
    tokens: int

    @property
    def loss(self) -> float:
        """Nats per trained token."""
        return self.nats / self.tokens

    @property
    def token_accuracy(self) -> float:
        return self.correct / self.tokens


def perplexity(scores: Sequence[Score]) -> float | None:
    """exp(nats of all examples / trained tokens of all examples), so a long answer weighs more than a short one.

    None where that is larger than a float holds.
    """
    try:
        return math.exp(sum(score.nats for score in scores) / sum(score.tokens for score in scores))
    except OverflowError:
        return None


def score_examples(
    model: LanguageModel,
    examples: Sequence[RenderedExample],
    *,
    batch_size: int,
    should_stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """One score per example, in their order. `should_stop` is asked before each batch and raises `Interrupted`.

    Raises `InvalidData` for an example without a trained token and `InvalidModel` when a loss is not a finite number.
    """
    for example in examples:
        if example.trained_tokens == 0:
            raise InvalidData(f"row {example.row} has no trained token, so it has no loss")
    scores: dict[int, Score] = {}
    vocabulary = unwrapped(model).config.get_text_config().vocab_size
    for batch in batches_by_length(examples, batch_size, vocabulary):
        if should_stop is not None and should_stop():
            raise Interrupted("stopped on request while losses were measured")
        scored = score_batch(model, [examples[index] for index in batch])
        scores.update(zip(batch, scored, strict=True))
        if progress is not None:
            progress(len(scores), len(examples))
    return [scores[index] for index in range(len(examples))]


def batches_by_length(examples: Sequence[RenderedExample], batch_size: int, vocabulary: int) -> Iterator[list[int]]:
    """Indices of examples of near lengths, longest first, within the limits of memory."""
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(examples)), key=lambda index: len(examples[index].ids), reverse=True):
        longest = max(longest, len(examples[index].ids))
        tokens = (len(batch) + 1) * longest
        if batch and (len(batch) == batch_size or tokens > TOKENS_PER_BATCH or tokens * vocabulary > LOGITS_PER_BATCH):
            yield batch
            batch, longest = [], len(examples[index].ids)
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def score_batch(model: LanguageModel, examples: list[RenderedExample]) -> list[Score]:
    """Scores of one batch. Padding stands on the right, where no earlier token sees it, so no mask is needed."""
    base = unwrapped(model)
    longest = max(len(example.ids) for example in examples)
    ids = torch.tensor([example.ids + [0] * (longest - len(example.ids)) for example in examples])  # (B, T)
    trained = torch.tensor(
        [[False, *example.trained[1:]] + [False] * (longest - len(example.ids)) for example in examples]
    )
    predicting = trained[:, 1:]  # (B, T - 1): position t predicts token t + 1
    kept = predicting.any(dim=0).nonzero()[:, 0]  # (K,) positions that predict a trained token of any example
    ids = ids.to(base.device)
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=kept.to(base.device)).logits  # (B, K, V)
    else:
        logits = model(input_ids=ids, use_cache=False).logits[:, kept]
    rows, columns = predicting[:, kept].nonzero(as_tuple=True)
    chosen: Tensor = logits[rows, columns].float()  # (trained tokens, V)
    labels = ids[rows, kept[columns] + 1]
    nats = cross_entropy(chosen, labels, reduction="none").double().cpu()
    correct = (chosen.argmax(-1) == labels).cpu()
    scores = []
    for row, example in enumerate(examples):
        of_row = rows == row
        total = float(nats[of_row].sum())
        if not math.isfinite(total):
            raise InvalidModel(
                f"the model gives row {example.row} a loss of {total}",
                hint="its weights hold values that are not numbers: was the training stable?",
            )
        scores.append(Score(total, int(correct[of_row].sum()), int(of_row.sum())))
    return scores
