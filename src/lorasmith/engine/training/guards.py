"""What must not happen silently: a step that is not finite, an adapter that is not, an adapter that learned nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.training.computation import Computation
from lorasmith.errors import JobFailed

SPIKE = 100.0  # times the median gradient norm of the steps before
REMEMBERED_NORMS = 50
LOWER_RATE = "lower --set training.learning_rate, or look at those rows with `lorasmith data preview`"
LEAST_NORMS = 10  # before that, the first steps of a run are not yet a measure


def trouble(loss: float, norm: float, norms: Sequence[float], first_loss: float | None) -> str | None:
    """Why a step must not be taken, or None. `norms` are the gradient norms of the steps before it.

    A model that knows its rows by heart has tiny gradients with spikes among them, which clipping mends: a step explodes
    only where its loss is above that of the first step as well.
    """
    if not math.isfinite(loss):
        return f"its loss is {loss}"
    if not math.isfinite(norm):
        return f"its gradient norm is {norm}"
    worse = first_loss is not None and loss > first_loss
    if worse and len(norms) >= LEAST_NORMS and norm > SPIKE * statistics.median(norms):
        return f"its gradient norm is {norm:.3g}, {norm / statistics.median(norms):.0f} times the usual"
    return None


@torch.no_grad()
def suspects(computation: Computation, indices: Sequence[int], rows: Sequence[RenderedExample]) -> list[int]:
    """Row numbers of the dataset whose own loss is not finite; all of the step's where no single one is to blame."""
    found = [rows[index].row for index in indices if not math.isfinite(computation.loss([index], rows))]
    return found or [rows[index].row for index in indices]


def check_end(step: int, validation_loss: float | None, left_out: str | None) -> None:
    """Raise `JobFailed` where the adapter of step `step` answers with values that are not finite, or may do so.

    A finite validation loss is the proof. Without one, a last step that was left out says that it may: nothing was learned
    since, and weights that are too large look like rows that are to blame.
    """
    if validation_loss is not None and not math.isfinite(validation_loss):
        text = f"the validation loss after step {step} is {validation_loss}"
    elif validation_loss is None and left_out:
        text = "the run ends with a step that was left out, and no validation says that the adapter still works"
    else:
        return
    raise JobFailed(
        f"{text}; {left_out}" if left_out else text,
        code="non_finite",
        hint=LOWER_RATE,
    )


def check_result(weights: dict[str, Tensor]) -> None:
    """Raise `JobFailed` for an adapter with a value that is not finite, or whose B matrices are all still zero."""
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise JobFailed(f"{name} holds values that are not finite", code="non_finite")
    ups = [weight for name, weight in weights.items() if ".lora_B." in name]
    if ups and not any(weight.any() for weight in ups):
        raise JobFailed(
            "every B of the adapter is still zero, so it changes nothing",
            code="nothing_learned",
            hint="a higher --set training.learning_rate or more steps",
        )
