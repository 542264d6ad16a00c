from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.training.batches import IGNORED, LENGTH_STEP, pad_batch, plan_steps
from lorasmith.engine.training.guards import LEAST_NORMS, trouble
from lorasmith.engine.training.schedule import (
    best_evaluation,
    evaluations_since_best,
    interval,
    learning_rate,
    warmup_length,
)


@given(rows=st.integers(1, 60), batch=st.integers(1, 9), accumulation=st.integers(1, 4), seed=st.integers(0, 99))
def test_each_epoch_sees_each_row_once(rows: int, batch: int, accumulation: int, seed: int) -> None:
    plan = plan_steps(rows, batch_size=batch, accumulation=accumulation, epochs=2, max_steps=None, seed=seed)
    assert plan.total_steps == 2 * plan.steps_per_epoch
    for epoch in range(2):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        assert sorted(index for step in steps for index in plan.row_indices(step)) == list(range(rows))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    plans = [
        plan_steps(50, batch_size=b, accumulation=a, epochs=2, max_steps=None, seed=3) for b, a in ((10, 1), (5, 2))
    ]
    assert [plans[0].row_indices(step) for step in range(10)] == [plans[1].row_indices(step) for step in range(10)]
    assert plans[0].row_indices(0) != plans[0].row_indices(5)


def test_padding_is_known_by_length_not_by_its_id() -> None:
    rows = [RenderedExample(1, [5, 6, 0], [False, True, True]), RenderedExample(2, [7, 0], [False, True])]
    ids, labels = pad_batch(rows, pad_id=0)
    assert ids.shape == labels.shape == (2, LENGTH_STEP)
    assert ids[:, :3].tolist() == [[5, 6, 0], [7, 0, 0]]
    assert labels[:, :3].tolist() == [[IGNORED, 6, 0], [IGNORED, 0, IGNORED]]
    assert (labels[:, 3:] == IGNORED).all()


def test_lengths_are_rounded_up_so_that_few_shapes_occur() -> None:
    shapes = {pad_batch([RenderedExample(1, [1] * n, [True] * n)], pad_id=0)[0].shape for n in range(1, 33)}
    assert shapes == {(1, LENGTH_STEP), (1, 2 * LENGTH_STEP)}


def test_the_rate_rises_to_its_peak_and_decays_to_zero() -> None:
    rates = [learning_rate(step, peak=1.0, warmup=4, total=20, kind="cosine") for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[12] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)))
    assert rates[20] == pytest.approx(0.0)
    assert learning_rate(12, peak=1.0, warmup=4, total=20, kind="linear") == pytest.approx(0.5)
    assert learning_rate(19, peak=1.0, warmup=4, total=20, kind="constant") == 1.0


@given(ratio=st.floats(0, 0.99), total=st.integers(1, 5000))
def test_a_warmup_ratio_is_a_share_of_the_run_and_leaves_a_step_at_the_peak(ratio: float, total: int) -> None:
    warmup = warmup_length(None, ratio, total)
    assert abs(warmup - ratio * total) <= max(0.5, ratio * total - (total - 1))
    assert learning_rate(warmup, peak=1.0, warmup=warmup, total=total, kind="cosine") == 1.0
    assert warmup_length(None, 0.06, 1000) == 60


def test_the_best_evaluation_is_the_lowest_and_the_earliest_of_equals() -> None:
    evaluations = [(0, 3.0), (10, math.nan), (20, 2.0), (30, 2.0), (40, 2.5)]
    assert best_evaluation(evaluations) == (20, 2.0)
    assert [evaluations_since_best(evaluations[:count]) for count in range(6)] == [0, 0, 1, 0, 1, 2]
    assert best_evaluation([(0, math.nan)]) is None


def test_a_short_run_still_reaches_its_peak_and_saves() -> None:
    assert warmup_length(100, None, 45) == 4
    assert warmup_length(100, None, 5000) == 100
    assert interval(100, 30, at_least=3) == 10
    assert interval(5, 3, at_least=10) == 1


def test_the_pad_id_never_reaches_the_loss() -> None:
    row = RenderedExample(1, [5, 6], [False, True])
    longer = RenderedExample(2, [5, 6, 7, 8], [False, True, True, True])
    _, labels = pad_batch([row, longer], pad_id=6)
    assert torch.equal(labels[0, :4], torch.tensor([IGNORED, 6, IGNORED, IGNORED]))


@pytest.mark.parametrize(
    ("loss", "norm", "norms", "reason"),
    [
        (math.nan, 1.0, [], "its loss is nan"),
        (1.0, math.inf, [], "its gradient norm is inf"),
        (9.0, 101.0, [1.0] * LEAST_NORMS, "its gradient norm is 101, 101 times the usual"),
        (9.0, 99.0, [1.0] * LEAST_NORMS, None),
        (9.0, 101.0, [1.0] * (LEAST_NORMS - 1), None),
        (0.7, 101.0, [1.0] * LEAST_NORMS, None),  # a spike in what is known by heart, which clipping mends
    ],
)
def test_a_step_is_in_trouble(loss: float, norm: float, norms: list[float], reason: str | None) -> None:
    assert trouble(loss, norm, norms, first_loss=2.5) == reason
