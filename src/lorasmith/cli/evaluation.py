"""`lorasmith eval`"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import console_out, hint, print_json, print_table, size
from lorasmith.cli.watching import JobView

if TYPE_CHECKING:
    from lorasmith.schemas.evaluation import Evaluation, Interval
    from lorasmith.services.workbench import Workbench

WIDE_COLUMNS = 125
SHARES = ("exact_match", "parses", "stopped", "token_accuracy")


def evaluate(
    context: typer.Context,
    adapter: Annotated[str | None, typer.Argument(help="Adapter to compare with its base")] = None,
    data: Annotated[str, typer.Option("--data", "-d", help="Name of a dataset, or a file to import")] = ...,  # type: ignore[assignment]
    model: Annotated[str | None, typer.Option("--model", "-m", help="Measure a base model alone")] = None,
    template: Annotated[str | None, typer.Option(help="Chat template for a base without one: chatml or plain")] = None,
    part: Annotated[str, typer.Option(help="train, val or test")] = "test",
    limit: Annotated[int | None, typer.Option(help="At most this many examples")] = None,
    shots: Annotated[int, typer.Option(help="Examples in the prompt of the extra base condition; 0 leaves it out")] = 3,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer")] = 160,
    batch_size: Annotated[int, typer.Option(help="Prompts answered together")] = 64,
    quantization: Annotated[
        str, typer.Option(help="none, nf4, fp4 or int8: measure on the base in fewer bits")
    ] = "none",
    double_quantization: Annotated[
        bool, typer.Option(help="With nf4 and fp4, quantise the scales of blocks too")
    ] = True,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap")] = 0,
    metrics: Annotated[
        list[str] | None, typer.Option(help="exact_match or parses; repeatable; by default what fits the answers")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the evaluation as JSON")] = False,
) -> None:
    """Compare base and base + adapter on held-out examples"""
    from lorasmith.schemas.evaluation import EvaluationSpec
    from lorasmith.services import evaluation
    from lorasmith.services.specs import parse_spec

    values = {
        "adapter": adapter,
        "model": model,
        "data": data,
        "template": template,
        "part": part,
        "limit": limit,
        "shots": shots,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "quantization": quantization,
        "double_quantization": double_quantization,
        "resamples": resamples,
        "seed": seed,
        "metrics": metrics,
    }
    spec = parse_spec(EvaluationSpec, values)
    workbench = open_workbench(context)
    with JobView("eval") as view:
        result = evaluation.evaluate(workbench, spec, view)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    show_evaluation(workbench, result)


def show_evaluation(workbench: Workbench, evaluation: Evaluation) -> None:
    """The before/after table with intervals, the verdict, and where the report is."""
    conditions = evaluation.conditions
    changes = {comparison.metric: comparison for comparison in evaluation.comparisons if comparison.baseline == "base"}
    columns = ["", *(condition.name for condition in conditions), *(["change from base"] if changes else [])]
    rows = []
    for metric in conditions[-1].metrics:
        cells = [metric, *(shown(metric, condition.metrics.get(metric)) for condition in conditions)]
        if changes:
            cells.append(shown(metric, changes[metric].difference, signed=True))
        rows.append(cells)
    blank = [""] if changes else []
    perplexities = [condition.perplexity for condition in conditions]
    rows.append(["perplexity", *("" if value is None else f"{value:.2f}" for value in perplexities), *blank])
    latencies = [condition.latency_s.mean for condition in conditions if condition.latency_s]
    if latencies:
        rows.append(["latency", *(f"{seconds:.2f} s" for seconds in latencies), *blank])
        rates = [f"{condition.generated_tokens_per_s:,.0f}" for condition in conditions]
        rows.append(["generated tokens/s", *rates, *blank])
    title = f"{evaluation.dataset}, {evaluation.part} part: {conditions[0].examples} examples, mean [95 % interval]"
    print_table(columns, rows, title=title)
    verdict = evaluation.settings.get("verdict", {})
    for sentence in (verdict.get("sentence"), verdict.get("against_examples")):
        if sentence:
            console_out().print(sentence, markup=False, soft_wrap=True)
    hint(f"peak memory {size(evaluation.peak_memory_bytes)}")
    console_out().print(f"report: {workbench.path(evaluation.folder) / 'report.html'}", markup=False, soft_wrap=True)


def shown(metric: str, interval: Interval | None, *, signed: bool = False) -> str:
    """`60.3 % [54.7, 65.9]`, on two lines where the terminal is narrow."""
    if interval is None:
        return ""
    gap = "\n" if console_out().width < WIDE_COLUMNS and sys.stdout.isatty() else " "
    sign = "+" if signed else ""
    if metric.startswith(SHARES):
        low, high = (f"{100 * value:{sign}.1f}" for value in (interval.low, interval.high))
        return f"{100 * interval.mean:{sign}.1f} %{gap}[{low}, {high}]"
    return f"{interval.mean:{sign}.3f}{gap}[{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
