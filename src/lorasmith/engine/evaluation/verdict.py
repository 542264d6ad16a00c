"""Did the adapter help? One word and two sentences, from the paired intervals alone."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from lorasmith.engine.evaluation.metrics import METRICS, Metric, metric_parts
from lorasmith.schemas.evaluation import Comparison, Evaluation, Interval

MINIMUM_SHARE = 0.05  # exact match below this in every condition says that the answers have many right forms


class Verdict(BaseModel):
    """`metric` decided; `sentence` says by how much, `against_examples` compares with the prompted base."""

    word: Literal["helped", "no clear change", "worse", "base only"]
    metric: str | None
    sentence: str
    against_examples: str | None = None


def verdict(evaluation: Evaluation) -> Verdict:
    """The deciding metric's interval against the base: wholly better is `helped`, wholly worse is `worse`."""
    metric = deciding_metric(evaluation)
    base, last = evaluation.conditions[0], evaluation.conditions[-1]
    scored = METRICS[metric]
    over = f"over {base.examples} examples of the {evaluation.part} part"
    if evaluation.adapter is None:
        shown = show_interval(scored, base.metrics[metric])
        return Verdict(
            word="base only", metric=metric, sentence=f"The base alone: {scored.title.lower()} {shown}, {over}."
        )
    against_base = {
        comparison.metric: comparison for comparison in evaluation.comparisons if comparison.baseline == base.name
    }
    direction = direction_of(against_base[metric])
    word: Literal["helped", "no clear change", "worse"] = (
        "helped" if direction > 0 else "worse" if direction < 0 else "no clear change"
    )
    opening = {
        "helped": "The adapter helped",
        "worse": "The adapter made it worse",
        "no clear change": "No clear change",
    }[word]
    sentence = (
        f"{opening}: {scored.title.lower()} went from {show(scored, base.metrics[metric].mean)} to "
        f"{show(scored, last.metrics[metric].mean)}, {show_difference(scored, against_base[metric].difference)}, {over}"
    )
    others = [name for name in METRICS if name in against_base and name != metric]
    opposed = [name for name in others if direction_of(against_base[name]) * direction < 0]
    moved = [name for name in others if direction == 0 and direction_of(against_base[name]) != 0]
    if opposed:
        sentence += f"; but {joined(opposed)} moved the other way"
    if moved:
        better = [name for name in moved if direction_of(against_base[name]) > 0]
        worse = [name for name in moved if name not in better]
        parts = [f"{joined(group)} got {way}" for group, way in ((better, "better"), (worse, "worse")) if group]
        sentence += f"; {' and '.join(parts)}"
    return Verdict(
        word=word, metric=metric, sentence=f"{sentence}.", against_examples=against_examples(evaluation, metric)
    )


def deciding_metric(evaluation: Evaluation) -> str:
    """Exact match where answers ever match; else whether code parses; else the loss."""
    measured = [condition.metrics for condition in evaluation.conditions]
    if any("exact_match" in metrics and metrics["exact_match"].mean >= MINIMUM_SHARE for metrics in measured):
        return "exact_match"
    return "parses" if "parses" in measured[0] else "loss"


def against_examples(evaluation: Evaluation, metric: str) -> str | None:
    prompted = next(
        (c for c in evaluation.comparisons if c.metric == metric and c.baseline != evaluation.conditions[0].name), None
    )
    if prompted is None:
        return None
    direction = direction_of(prompted)
    judged = "better than" if direction > 0 else "worse than" if direction < 0 else "not clearly different from"
    return f"It is {judged} {prompted.baseline} in the prompt: {show_difference(METRICS[metric], prompted.difference)}."


def direction_of(comparison: Comparison) -> int:
    """1 when the whole interval is on the better side, -1 on the worse, 0 when it holds zero."""
    metric, _ = metric_parts(comparison.metric)
    sign = 1 if metric.higher_is_better else -1
    if comparison.difference.low > 0:
        return sign
    return -sign if comparison.difference.high < 0 else 0


def joined(names: list[str]) -> str:
    titles = [METRICS[name].title.lower() for name in names]
    return titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} and {titles[-1]}"


def show(metric: Metric, value: float) -> str:
    return f"{100 * value:.1f} %" if metric.share else f"{value:.3f} nats"


def show_interval(metric: Metric, interval: Interval) -> str:
    low, high = (f"{100 * end:.1f}" if metric.share else f"{end:.3f}" for end in (interval.low, interval.high))
    return f"{show(metric, interval.mean)} (95 % interval {low} to {high})"


def show_difference(metric: Metric, interval: Interval) -> str:
    scale, digits, unit = (100, 1, "points") if metric.share else (1, 3, "nats")
    mean, low, high = (signed(scale * value, digits) for value in (interval.mean, interval.low, interval.high))
    return f"{mean} {unit} (95 % interval {low} to {high})"


def signed(value: float, digits: int) -> str:
    """With a sign, a true minus, and no sign on zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"+{text}" if value > 0 else f"\N{MINUS SIGN}{text}"
