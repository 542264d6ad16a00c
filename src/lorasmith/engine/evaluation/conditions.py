"""One condition of an evaluation: the same examples scored and answered, with the adapter on or off."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from lorasmith.engine.evaluation.cases import Case
from lorasmith.engine.evaluation.metrics import METRICS, are_python, exact_match, parses
from lorasmith.engine.evaluation.scoring import Score, score_examples
from lorasmith.engine.models.generation import Generated, LanguageModel, generate_greedy
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.evaluation import EvaluationSpec, ExampleRecord


@dataclass(frozen=True)
class Measured:
    """One condition on all examples: a score each, an answer each unless the data is plain text."""

    name: str
    cases: list[Case]
    scores: list[Score]
    generated: list[Generated]
    answers: list[str]
    values: dict[str, list[float]]  # metric name -> one value per example
    generation_s: float

    def table(self) -> NDArray[np.float64]:
        """(examples, metrics)"""
        return np.array(list(self.values.values())).T


def answer_metrics(spec: EvaluationSpec, cases: list[Case]) -> list[str]:
    """Which metrics compare answers with what was expected; none when a case is plain text."""
    if any(case.prompt is None for case in cases):
        if spec.metrics:
            raise InvalidSpec(
                f"{', '.join(spec.metrics)} cannot be measured on plain texts, which have no question and answer",
                hint="leave out --metrics: loss, perplexity and token accuracy are always measured",
            )
        return []
    if spec.metrics is not None:
        return [*dict.fromkeys(spec.metrics), "stopped"]
    python = are_python([case.example.answer() for case in cases])
    return ["exact_match", *(["parses"] if python else []), "stopped"]


def measure(
    name: str,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: list[Case],
    metrics: list[str],
    spec: EvaluationSpec,
    stop_ids: set[int],
    report: Reporter,
    *,
    adapted: bool,
) -> Measured:
    """Score and, for conversations, answer every case, with the adapter on or off."""

    def should_stop() -> bool:
        return report.stop_requested

    def progress(done: int, total: int) -> None:
        report("progress", condition=name, done=done, total=total)

    report("phase", name=f"{name}: loss")
    plain: AbstractContextManager[Any] = nullcontext()
    with plain if adapted or not isinstance(model, PeftModel) else model.disable_adapter():
        scores = score_examples(
            model,
            [case.rendered for case in cases],
            batch_size=spec.batch_size,
            should_stop=should_stop,
            progress=progress,
        )
        generated: list[Generated] = []
        started = time.perf_counter()
        if metrics:
            report("phase", name=f"{name}: answers")
            generated = generate_greedy(
                model,
                [case.prompt for case in cases if case.prompt is not None],
                max_new_tokens=spec.max_new_tokens,
                stop_ids=stop_ids,
                pad_id=int(tokenizer.pad_token_id or 0),
                batch_size=spec.batch_size,
                should_stop=should_stop,
                progress=progress,
            )
        generation_s = time.perf_counter() - started
    # special tokens stay in the text: an answer that holds `<|im_start|>` must not count as equal to one without
    answers = [str(tokenizer.decode(answer.ids, skip_special_tokens=False)) for answer in generated]
    return Measured(
        name, cases, scores, generated, answers, metric_values(cases, scores, generated, answers, metrics), generation_s
    )


def metric_values(
    cases: list[Case], scores: list[Score], generated: list[Generated], answers: list[str], metrics: list[str]
) -> dict[str, list[float]]:
    """One value per example for each metric, in the order in which a report shows them."""
    values: dict[str, list[float]] = {}
    if "exact_match" in metrics:
        values["exact_match"] = [
            float(exact_match(answer, case.example.answer())) for answer, case in zip(answers, cases, strict=True)
        ]
    if "parses" in metrics:
        values["parses"] = [float(parses(answer)) for answer in answers]
    if "stopped" in metrics:
        values["stopped"] = [float(answer.stopped) for answer in generated]
    values["token_accuracy"] = [score.token_accuracy for score in scores]
    values["loss"] = [score.loss for score in scores]
    assert set(values) <= set(METRICS)
    return values


def example_records(conditions: list[Measured], tokenizer: PreTrainedTokenizerBase) -> list[ExampleRecord]:
    records = []
    for row, case in enumerate(conditions[0].cases):
        metrics: dict[str, dict[str, float]] = {}
        for condition in conditions:
            measured = {name: values[row] for name, values in condition.values.items()}
            measured["trained_tokens"] = condition.scores[row].tokens
            if condition.generated:
                answer = condition.generated[row]
                measured["prompt_tokens"] = len(condition.cases[row].prompt or [])
                measured["answer_tokens"] = len(answer.ids)
                measured["latency_s"] = answer.seconds
            metrics[condition.name] = measured
        prompt = str(tokenizer.decode(case.prompt, skip_special_tokens=False)) if case.prompt is not None else ""
        answers = {condition.name: condition.answers[row] for condition in conditions if condition.answers}
        reference = case.example.answer()
        records.append(
            ExampleRecord(
                example_id=case.example.id, prompt=prompt, reference=reference, answers=answers, metrics=metrics
            )
        )
    return records
