"""Measure a base model, the base with examples in its prompt, and base + adapter, on the same held-out examples."""

from __future__ import annotations

import platform
import resource
import shlex
import sys
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.data.examples import read_examples
from lorasmith.engine.data.templates import choose_template
from lorasmith.engine.evaluation.bootstrap import mean_interval, mean_intervals, paired_differences
from lorasmith.engine.evaluation.cases import Case, FewShot, few_shot, make_cases
from lorasmith.engine.evaluation.conditions import Measured, answer_metrics, example_records, measure
from lorasmith.engine.evaluation.metrics import parameter_count
from lorasmith.engine.evaluation.report import report_html
from lorasmith.engine.evaluation.scoring import perplexity
from lorasmith.engine.evaluation.verdict import verdict
from lorasmith.engine.lora.quantized import Quantization
from lorasmith.engine.models.generation import LanguageModel, unwrapped
from lorasmith.engine.models.loading import (
    check_base,
    context_tokens,
    eos_token_ids,
    load_adapter,
    load_model,
    load_tokenizer,
    load_within_memory,
    model_folder,
    other_precision,
)
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import InvalidSpec
from lorasmith.files import new_id, read_json, staged_folder, write_text
from lorasmith.schemas.data import Example
from lorasmith.schemas.evaluation import (
    Comparison,
    ConditionResult,
    Evaluation,
    EvaluationInputs,
    EvaluationSpec,
    Interval,
)
from lorasmith.schemas.jobs import JobOrder

EVALUATION_FOLDER = "evaluation"
SUBGROUP = "2+ parameters"


def run(order: JobOrder, folder: Path, report: Reporter) -> Evaluation:
    """The finished evaluation; `evaluation.json`, `examples.jsonl` and `report.html` are in `folder/evaluation`."""
    spec = EvaluationSpec.model_validate(order.spec)
    inputs = EvaluationInputs.model_validate(order.inputs)
    report("phase", name="loading")
    quantization = Quantization.named(spec.quantization, spec.double_quantization)
    model, tokenizer = load(inputs, quantization)
    caveat = other_precision(Path(inputs.adapter_folder), quantization) if inputs.adapter_folder else None
    if caveat:
        report("warning", text=caveat)
    examples = sorted(read_examples(Path(inputs.examples_file)), key=lambda example: example.id)[: spec.limit]
    if any(example.messages is not None for example in examples):
        choose_template(tokenizer, spec.template)
    stop_ids = eos_token_ids(unwrapped(model), tokenizer)
    context = context_tokens(unwrapped(model))
    cases, left_out = make_cases(tokenizer, examples, stop_ids, context)
    shown = shots_for(cases, spec, inputs, tokenizer, stop_ids, context)
    names = answer_metrics(spec, cases)

    conditions = [measure("base", model, tokenizer, cases, names, spec, stop_ids, report, adapted=False)]
    if shown.cases:
        name = f"base + {spec.shots} example{'s' if spec.shots > 1 else ''}"
        conditions.append(measure(name, model, tokenizer, shown.cases, names, spec, stop_ids, report, adapted=False))
    if inputs.adapter_name is not None:
        taken = {condition.name for condition in conditions}
        name = f"adapter {inputs.adapter_name}" if inputs.adapter_name in taken else inputs.adapter_name
        conditions.append(measure(name, model, tokenizer, cases, names, spec, stop_ids, report, adapted=True))

    report("phase", name="comparing")
    groups = example_groups(cases)
    results = [summarise(condition, groups, spec) for condition in conditions]
    for result in results:
        for metric, interval in result.metrics.items():
            report("metric", condition=result.name, metric=metric, **interval.model_dump())
    comparisons = compare(conditions, groups, spec) if inputs.adapter_name is not None else []
    evaluation = Evaluation(
        id=evaluation_id(order.id),
        name=f"{inputs.adapter_name or inputs.model_name} on {inputs.dataset_name} ({spec.part})",
        adapter=inputs.adapter_name,
        model=inputs.model_name,
        dataset=inputs.dataset_name,
        dataset_id=inputs.dataset_id,
        dataset_sha256=inputs.dataset_sha256,
        part=spec.part,
        conditions=results,
        comparisons=comparisons,
        peak_memory_bytes=peak_memory_bytes(),
        settings={
            **settings(spec, tokenizer, stop_ids, context),
            "few_shot": {"reason": shown.reason, "example_ids": [shot.id for shot in shown.shots]},
            "left_out": left_out,
            "caveats": [caveat] if caveat else [],
            "subgroups": {name: len(rows) for name, rows in groups.items() if name},
            "trained_tokens": sum(score.tokens for score in conditions[0].scores),
            "command": command(spec),
        },
        folder=EVALUATION_FOLDER,
    )
    evaluation.settings["verdict"] = verdict(evaluation).model_dump()
    report("phase", name="report")
    records = example_records(conditions, tokenizer)
    training_events = Path(inputs.training_events) if inputs.training_events else None
    with staged_folder(folder / EVALUATION_FOLDER, replace=True) as staging:
        write_text(staging / "evaluation.json", evaluation.model_dump_json(indent=2) + "\n")
        write_text(staging / "examples.jsonl", "".join(record.model_dump_json() + "\n" for record in records))
        write_text(staging / "report.html", report_html(evaluation, records, training_events))
    return evaluation


def load(inputs: EvaluationInputs, quantization: Quantization | None) -> tuple[LanguageModel, PreTrainedTokenizerBase]:
    """One resident base in float32, with the adapter on it, and the tokenizer that the adapter was trained with."""
    base_folder = model_folder(inputs.model_folder)
    if quantization and inputs.adapter_folder:
        refuse_moved_weights(Path(inputs.adapter_folder))
    base = (
        load_model(base_folder, torch.float32, quantization)
        if quantization
        else load_within_memory(base_folder, "fp32")
    )
    if inputs.adapter_folder is None:
        return base, load_tokenizer(base_folder)
    adapter_folder = Path(inputs.adapter_folder)
    check_base(adapter_folder, base_folder)
    has_tokenizer = (adapter_folder / "tokenizer.json").is_file() or (adapter_folder / "tokenizer.model").is_file()
    tokenizer = load_tokenizer(adapter_folder if has_tokenizer else base_folder)
    return load_adapter(base, adapter_folder), tokenizer


def refuse_moved_weights(adapter_folder: Path) -> None:
    """Raise `InvalidSpec` for an adapter that was trained beside other weights than those that quantising the base gives."""
    config = adapter_folder / "training_config.json"
    init = read_json(config)["lora"]["init"] if config.is_file() else "default"
    if init in ("pissa", "olora", "loftq"):
        raise InvalidSpec(
            f"lora.init={init} took the adapter's first weights out of the base before it was quantised; a quantised base has them still",
            hint="evaluate it on the full base: --quantization none",
        )


def shots_for(
    cases: list[Case],
    spec: EvaluationSpec,
    inputs: EvaluationInputs,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: set[int],
    context: int | None,
) -> FewShot:
    if spec.shots == 0:
        return FewShot([], [], "not asked for")
    if inputs.shots_file is None:
        return FewShot([], [], "there is no training part to take examples from")
    candidates: list[Example] = read_examples(Path(inputs.shots_file))
    return few_shot(tokenizer, cases, candidates, shots=spec.shots, stop_ids=stop_ids, context=context)


def example_groups(cases: list[Case]) -> dict[str, list[int]]:
    """Row numbers by subgroup; the group without a name holds all.

    Where every answer lists parameters, those with two or more are also shown alone: one parameter is easy to copy.
    """
    groups = {"": list(range(len(cases)))}
    counts = [parameter_count(case.example.answer()) if case.prompt is not None else None for case in cases]
    several = [row for row, count in enumerate(counts) if count is not None and count >= 2]
    if None not in counts and 0 < len(several) < len(cases):
        groups[SUBGROUP] = several
    return groups


def grouped(metric: str, group: str) -> str:
    return f"{metric}[{group}]" if group else metric


def summarise(condition: Measured, groups: dict[str, list[int]], spec: EvaluationSpec) -> ConditionResult:
    metrics: dict[str, Interval] = {}
    for group, rows in groups.items():
        intervals = mean_intervals(condition.table()[rows], resamples=spec.resamples, seed=spec.seed)
        metrics.update(
            {grouped(name, group): interval for name, interval in zip(condition.values, intervals, strict=True)}
        )
    seconds = [answer.seconds for answer in condition.generated]
    tokens = sum(len(answer.ids) + answer.stopped for answer in condition.generated)
    return ConditionResult(
        name=condition.name,
        examples=len(condition.scores),
        metrics=metrics,
        perplexity=perplexity(condition.scores),
        latency_s=mean_interval(seconds, resamples=spec.resamples, seed=spec.seed) if seconds else None,
        generated_tokens_per_s=tokens / condition.generation_s if tokens else 0.0,
    )


def compare(conditions: list[Measured], groups: dict[str, list[int]], spec: EvaluationSpec) -> list[Comparison]:
    """The adapter, which is the last condition, against each of the others."""
    *baselines, adapter = conditions
    comparisons = []
    for baseline in baselines:
        for group, rows in groups.items():
            differences = paired_differences(
                adapter.table()[rows], baseline.table()[rows], resamples=spec.resamples, seed=spec.seed
            )
            comparisons += [
                Comparison(
                    baseline=baseline.name, treatment=adapter.name, metric=grouped(metric, group), difference=difference
                )
                for metric, difference in zip(adapter.values, differences, strict=True)
            ]
    return comparisons


def settings(
    spec: EvaluationSpec, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int], context: int | None
) -> dict[str, Any]:
    return {
        "precision": "float32",  # exactness before speed: a tie broken by rounding is not a difference of the adapter
        "decoding": "greedy",
        "stop_tokens": tokenizer.convert_ids_to_tokens(sorted(stop_ids)),
        "context_tokens": context,
        **spec.model_dump(
            include={"part", "limit", "shots", "max_new_tokens", "batch_size", "quantization", "resamples", "seed"}
        ),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def command(spec: EvaluationSpec) -> str:
    """The shell command that measures the same again."""
    words = ["lorasmith", "eval", *([spec.adapter] if spec.adapter is not None else [])]
    silent = {"adapter"} if spec.quantization != "none" else {"adapter", "quantization", "double_quantization"}
    for field, value in spec.model_dump(exclude=silent, exclude_none=True).items():
        option = field.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
            continue
        for item in value if isinstance(value, list) else [value]:
            words += [f"--{option}", str(item)]
    return shlex.join(words)


def evaluation_id(job_id: str) -> str:
    """The job's id with its type replaced, so that a replay of the folder gives the same evaluation."""
    _, separator, ulid = job_id.partition("_")
    return f"evaluation_{ulid}" if separator and ulid else new_id("evaluation")


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
