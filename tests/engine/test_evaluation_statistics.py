"""Metrics on single answers, bootstrap intervals against scipy and closed forms, and the verdict they lead to."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lorasmith.engine.evaluation.bootstrap import mean_interval, mean_intervals, paired_differences
from lorasmith.engine.evaluation.metrics import are_python, exact_match, parameter_count, parses
from lorasmith.engine.evaluation.verdict import verdict
from lorasmith.schemas.evaluation import Comparison, ConditionResult, Evaluation, Interval


def test_exact_match_ignores_surrounding_white_space_only() -> None:
    assert exact_match(" yes\n", "yes")
    assert not exact_match("Yes", "yes")
    assert not exact_match("y es", "yes")


def test_equal_json_in_another_spelling_is_no_exact_match() -> None:
    assert not exact_match('{"a":1}', '{"a": 1}')


@pytest.mark.parametrize("answer", ["def f():\n    return 1", "x", '{"a": [1]}', "print('\\d')"])
def test_python_parses(answer: str) -> None:
    assert parses(answer)


@pytest.mark.parametrize("answer", ["", "  \n", "def f(:", "return of the", "x = '\x00'", "(" * 2000])
def test_empty_or_broken_text_does_not_parse(answer: str) -> None:
    assert not parses(answer)


def test_references_are_python_when_all_are_code_and_none_is_json() -> None:
    assert are_python(["def f(): pass", "x = 1\ny = 2"])
    assert not are_python(["def f(): pass", "forty two words"])
    assert not are_python(["yes", "no"])  # names parse, but they are answers, not code
    assert not are_python(['{\n"a": 1}'])
    assert not are_python([])


def test_parameters_are_counted_in_json_objects_only() -> None:
    assert parameter_count('{"name": "f", "parameters": ["a", "*b"]}') == 2
    assert parameter_count('{"parameters": 3}') is None
    assert parameter_count("[1, 2]") is None
    assert parameter_count("def f(a, b)") is None


def test_the_interval_of_a_mean_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=80)
    ours = mean_interval(values, resamples=10_000, seed=0)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    # Two independent sets of 10,000 draws: a 2.5 % quantile has a standard error near 0.03 standard errors of the mean.
    tolerance = 4 * 0.03 * values.std() / np.sqrt(len(values))
    assert ours.mean == pytest.approx(values.mean(), abs=1e-12)
    assert ours.low == pytest.approx(theirs.low, abs=tolerance)
    assert ours.high == pytest.approx(theirs.high, abs=tolerance)


def test_the_interval_of_paired_differences_agrees_with_scipy_on_pairs() -> None:
    rng = np.random.default_rng(0)
    baseline = (rng.random(120) < 0.4).astype(float)
    treatment = np.maximum(baseline, rng.random(120) < 0.3)
    ours = paired_differences(treatment[:, None], baseline[:, None], resamples=10_000, seed=0)[0]
    theirs = stats.bootstrap(
        (treatment, baseline), lambda x, y, axis: np.mean(x - y, axis=axis), paired=True, n_resamples=10_000,
        method="percentile", rng=1, vectorized=True,
    ).confidence_interval  # fmt: skip
    assert ours.low == pytest.approx(theirs.low, abs=1 / 120)  # means are multiples of 1 / 120
    assert ours.high == pytest.approx(theirs.high, abs=1 / 120)


def test_equal_values_give_an_interval_without_width() -> None:
    assert mean_interval([0.1] * 7, resamples=500, seed=0) == Interval(mean=0.1, low=0.1, high=0.1)


def test_one_example_gives_an_interval_without_width() -> None:
    assert mean_interval([0.3], resamples=500, seed=0) == Interval(mean=0.3, low=0.3, high=0.3)


def test_two_coins_reach_from_zero_to_one() -> None:
    # Both draws hit the same value with probability 1/4 each, more than 2.5 %.
    assert mean_interval([0.0, 1.0], resamples=10_000, seed=0) == Interval(mean=0.5, low=0.0, high=1.0)


def test_a_treatment_that_always_adds_the_same_is_certain_however_the_examples_vary() -> None:
    baseline = np.random.default_rng(0).integers(0, 100, size=(50, 1)).astype(float)
    assert paired_differences(baseline + 2, baseline, resamples=500, seed=0) == [Interval(mean=2, low=2, high=2)]


def test_every_column_is_resampled_with_the_same_examples() -> None:
    values = np.random.default_rng(0).random(40)
    first, second = mean_intervals(np.stack([values, 2 * values], axis=1), resamples=1000, seed=3)
    assert second.low == pytest.approx(2 * first.low, rel=1e-12)
    assert second.high == pytest.approx(2 * first.high, rel=1e-12)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(0).random(40)
    assert mean_interval(values, resamples=1000, seed=3) == mean_interval(values, resamples=1000, seed=3)
    assert mean_interval(values, resamples=1000, seed=3) != mean_interval(values, resamples=1000, seed=4)


def at(mean: float, width: float = 0.02) -> Interval:
    return Interval(mean=mean, low=mean - width, high=mean + width)


def evaluation_with(before: dict[str, float], after: dict[str, float], differences: dict[str, Interval]) -> Evaluation:
    conditions = [
        ConditionResult(
            name=name,
            examples=100,
            metrics={metric: at(value) for metric, value in metrics.items()},
            perplexity=2.0,
            latency_s=at(1.0),
            generated_tokens_per_s=10.0,
        )
        for name, metrics in (("base", before), ("mine", after))
    ]
    comparisons = [
        Comparison(baseline="base", treatment="mine", metric=metric, difference=difference)
        for metric, difference in differences.items()
    ]
    return Evaluation(
        id="evaluation_1",
        name="mine on rows",
        adapter="mine",
        model="starter",
        dataset="rows",
        part="test",
        conditions=conditions,
        comparisons=comparisons,
        peak_memory_bytes=1,
        settings={},
        folder="evaluation",
    )


def test_an_interval_above_zero_says_helped() -> None:
    reached = verdict(evaluation_with({"exact_match": 0.1}, {"exact_match": 0.6}, {"exact_match": at(0.5)}))
    assert reached.word == "helped"
    assert reached.sentence == (
        "The adapter helped: exact match went from 10.0 % to 60.0 %, +50.0 points (95 % interval +48.0 to +52.0), "
        "over 100 examples of the test part."
    )


def test_an_interval_that_holds_zero_says_no_clear_change_and_names_what_moved() -> None:
    metrics = {"exact_match": 0.5, "loss": 2.0}
    reached = verdict(evaluation_with(metrics, metrics, {"exact_match": at(0.01), "loss": at(-0.5)}))
    assert reached.word == "no clear change"
    assert reached.sentence.endswith("; loss got better.")


def test_an_interval_below_zero_says_worse_also_when_the_loss_fell() -> None:
    reached = verdict(
        evaluation_with(
            {"exact_match": 0.5, "loss": 2.0},
            {"exact_match": 0.3, "loss": 1.5},
            {"exact_match": at(-0.2), "loss": at(-0.5)},
        )
    )
    assert reached.word == "worse"
    assert reached.sentence.endswith("; but loss moved the other way.")


def test_a_loss_that_fell_has_helped_where_no_answer_can_match() -> None:
    reached = verdict(
        evaluation_with(
            {"exact_match": 0.0, "loss": 2.0},
            {"exact_match": 0.01, "loss": 1.5},
            {"exact_match": at(0.01), "loss": at(-0.5)},
        )
    )
    assert (reached.word, reached.metric) == ("helped", "loss")
