"""The report page: one HTML file that needs no network and reads well on a screen, on a phone and on paper."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lorasmith.engine.evaluation.metrics import metric_parts
from lorasmith.engine.evaluation.verdict import direction_of, show, show_difference, verdict
from lorasmith.plots import Series, histogram, line_chart, page_style, share_bars
from lorasmith.schemas.evaluation import Comparison, ConditionResult, Evaluation, ExampleRecord, Interval

TEMPLATE = Path(__file__).with_name("report.html.jinja")
SHOWN_EXAMPLES = 12
SHOWN_FAILURES = 8  # of those, so that a reader also sees what works


@dataclass(frozen=True)
class Cell:
    value: str
    interval: str


@dataclass(frozen=True)
class Change:
    words: str
    verdict: str  # better, worse or unclear


@dataclass(frozen=True)
class MetricRow:
    title: str
    meaning: str
    cells: list[Cell]
    changes: list[Change]


@dataclass(frozen=True)
class MetricTable:
    caption: str
    rows: list[MetricRow]


@dataclass(frozen=True)
class ShownAnswer:
    condition: str
    style: str
    text: str
    mark: str  # what the metrics say about it, in words
    right: bool | None


@dataclass(frozen=True)
class ShownExample:
    prompt: str
    reference: str
    failed: bool
    answers: list[ShownAnswer]


def report_html(evaluation: Evaluation, records: list[ExampleRecord], training_events: Path | None) -> str:
    """The page as text. It holds model output, which is escaped everywhere."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    styles = condition_styles(evaluation)
    examples = [shown_example(record, styles) for record in chosen_examples(evaluation, records)]
    return template.render(
        style=Markup(page_style()),
        evaluation=evaluation,
        verdict=verdict(evaluation),
        styles=styles,
        tables=metric_tables(evaluation),
        baselines=[condition.name for condition in evaluation.conditions[:-1]] if evaluation.comparisons else [],
        answered=any(condition.latency_s is not None for condition in evaluation.conditions),
        bars=condition_bars(evaluation, styles),
        curve=loss_curve(training_events),
        lengths=length_charts(evaluation, records),
        examples=examples,
        failures=sum(failed(record, evaluation.conditions[-1].name) for record in records),
        total=len(records),
        settings={name: settings_text(value) for name, value in evaluation.settings.items() if name in SETTINGS_SHOWN},
        few_shot=evaluation.settings.get("few_shot", {}),
        left_out=evaluation.settings.get("left_out", []),
        command=evaluation.settings.get("command", ""),
        created=f"{evaluation.created_at:%Y-%m-%d %H:%M} UTC",
        peak_memory=f"{evaluation.peak_memory_bytes / 2**30:.2f} GiB",
        seconds=duration,
    )


SETTINGS_SHOWN = (
    "part", "limit", "shots", "max_new_tokens", "batch_size", "decoding", "stop_tokens", "context_tokens", "trained_tokens",
    "precision", "threads", "resamples", "seed", "torch", "transformers", "peft", "python", "machine",
)  # fmt: skip


def settings_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "not set" if value is None else str(value)


def duration(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def condition_styles(evaluation: Evaluation) -> dict[str, str]:
    """The colour class of each condition: the base, the base with examples, the adapter."""
    names = [condition.name for condition in evaluation.conditions]
    styles = dict.fromkeys(names, "prompted")
    styles[names[0]] = "base"
    if evaluation.adapter is not None:
        styles[names[-1]] = "adapter"
    return styles


def metric_tables(evaluation: Evaluation) -> list[MetricTable]:
    """One table over all examples and one for each subgroup."""
    subgroups: dict[str, int] = evaluation.settings.get("subgroups", {})
    captions = {"": f"All {evaluation.conditions[0].examples} examples"}
    captions |= {name: f"The {count} examples with {name}" for name, count in subgroups.items()}
    rows: dict[str, list[MetricRow]] = {}
    for name in evaluation.conditions[0].metrics:
        metric, group = metric_parts(name)
        changes = [change(comparison) for comparison in evaluation.comparisons if comparison.metric == name]
        cells = [cell(condition, name) for condition in evaluation.conditions]
        rows.setdefault(group, []).append(MetricRow(metric.title, metric.meaning, cells, changes))
    perplexities = [condition.perplexity for condition in evaluation.conditions]
    rows[""].append(
        MetricRow(
            "Perplexity",
            "exp of all nats over all trained tokens of the part, so long answers weigh more; lower is better",
            [Cell("over 10³⁰⁸" if value is None else f"{value:.2f}", "") for value in perplexities],
            [Change("", "unclear") for _ in perplexities[:-1] if evaluation.comparisons],
        )
    )
    return [MetricTable(captions.get(group, group), of_group) for group, of_group in rows.items()]


def cell(condition: ConditionResult, name: str) -> Cell:
    metric, _ = metric_parts(name)
    interval = condition.metrics[name]
    ends = (f"{100 * end:.1f}" if metric.share else f"{end:.3f}" for end in (interval.low, interval.high))
    return Cell(show(metric, interval.mean), "{} to {}".format(*ends))


def change(comparison: Comparison) -> Change:
    metric, _ = metric_parts(comparison.metric)
    words = show_difference(metric, comparison.difference).replace("95 % interval ", "")
    return Change(words, {1: "better", -1: "worse", 0: "unclear"}[direction_of(comparison)])


def condition_bars(evaluation: Evaluation, styles: dict[str, str]) -> Markup:
    groups: list[tuple[str, list[tuple[str, str, Interval]]]] = []
    for name in evaluation.conditions[0].metrics:
        metric, group = metric_parts(name)
        if metric.share and not group:
            bars = [
                (condition.name, styles[condition.name], condition.metrics[name]) for condition in evaluation.conditions
            ]
            groups.append((metric.title, bars))
    return Markup(share_bars("Metrics of each condition", groups))  # every text in it is escaped there


def loss_curve(training_events: Path | None) -> Markup | None:
    """Training and validation loss of the job that made the adapter, or None where there is nothing to draw.

    A resumed job repeats steps: the later line of a step is the one that counts.
    """
    if training_events is None or not training_events.is_file():
        return None
    losses: dict[str, dict[float, float]] = {"step": {}, "evaluation": {}}
    with training_events.open(encoding="utf-8") as handle:
        for line in handle:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the last line of a job that was killed may be torn
            data = event.get("data", {})
            if event.get("type") in losses and isinstance(data.get("loss"), float | int):
                losses[event["type"]][float(data["step"])] = float(data["loss"])
    named = (("training", "adapter", losses["step"]), ("validation", "prompted", losses["evaluation"]))
    series = [Series(name, style, sorted(points.items())) for name, style, points in named if points]
    if not series:
        return None
    return Markup(line_chart("Loss during training", series, x_label="optimizer step", y_label="nats per token"))


def length_charts(evaluation: Evaluation, records: list[ExampleRecord]) -> list[Markup]:
    """Tokens of the prompts and of the expected answers (with their stop token), or of the texts."""
    name = evaluation.conditions[0].name
    prompts = [record.metrics[name]["prompt_tokens"] for record in records if "prompt_tokens" in record.metrics[name]]
    answers = [record.metrics[name]["trained_tokens"] for record in records]
    charts = [histogram("Length of the prompts", prompts, style="base", x_label="prompt tokens")] if prompts else []
    label = "tokens of the expected answer" if prompts else "tokens of the text"
    charts.append(histogram("Length of the expected answers", answers, style="base", x_label=label))
    return [Markup(chart) for chart in charts]


def failed(record: ExampleRecord, condition: str) -> bool:
    """Whether the condition's answer is not what was expected (or does not parse, where only that was measured)."""
    metrics = record.metrics[condition]
    return metrics.get("exact_match", metrics.get("parses", 1.0)) == 0.0


def chosen_examples(evaluation: Evaluation, records: list[ExampleRecord]) -> list[ExampleRecord]:
    """Failures of the last condition first, then successes; plain texts by loss, the worst first."""
    last = evaluation.conditions[-1].name
    if not records[0].answers:
        return sorted(records, key=lambda record: -record.metrics[last]["loss"])[:SHOWN_EXAMPLES]
    failures = [record for record in records if failed(record, last)]
    successes = [record for record in records if not failed(record, last)]
    shown = failures[: max(SHOWN_FAILURES, SHOWN_EXAMPLES - len(successes))]
    return shown + successes[: SHOWN_EXAMPLES - len(shown)]


def shown_example(record: ExampleRecord, styles: dict[str, str]) -> ShownExample:
    """Expected, base and adapter side by side; the prompted base is in `examples.jsonl`."""
    answers = []
    for name, style in styles.items():
        if style == "prompted":
            continue
        metrics = record.metrics[name]
        right: bool | None = None
        mark = f"loss {metrics['loss']:.3f}"
        if "exact_match" in metrics:
            right = metrics["exact_match"] == 1.0
            mark = "as expected" if right else "differs"
        if metrics.get("parses") == 0.0:
            mark += ", does not parse"
        if metrics.get("stopped") == 0.0:
            mark += ", did not stop"
        answers.append(ShownAnswer(name, style, record.answers.get(name, ""), mark, right))
    return ShownExample(record.prompt, record.reference, failed(record, list(styles)[-1]), answers)
