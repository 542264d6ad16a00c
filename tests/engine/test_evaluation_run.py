"""An evaluation job: what it measures, what it writes, and a report page that is whole, safe and self-contained."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lorasmith.engine.evaluation.report import loss_curve, report_html
from lorasmith.engine.evaluation.run import command, run
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import Interrupted, InvalidSpec
from lorasmith.plots import Series, histogram, line_chart, ticks
from lorasmith.schemas.data import Example, Message
from lorasmith.schemas.evaluation import Evaluation, EvaluationSpec, ExampleRecord
from lorasmith.schemas.jobs import JobKind, JobOrder
from tests.engine.small_jobs import counting_examples, events, write_examples

HOSTILE = '<script>alert(1)</script> & "quotes" </pre>'


def signature_examples(count: int) -> list[Example]:
    rows = []
    for index in range(count):
        parameters = ["a", "b", "c"][: 1 + index % 3]
        answer = json.dumps({"name": f"f{index}", "parameters": parameters, "defaults": {}})
        messages = [
            Message(role="user", content=f"def f{index}({', '.join(parameters)}): {HOSTILE if index == 0 else ''}"),
            Message(role="assistant", content=answer),
        ]
        rows.append(Example(id=f"{index:016x}", group=str(index), row=index + 1, messages=messages))
    return rows


@pytest.fixture(scope="module")
def adapter_folder(qwen2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter: its answers differ from the base's, for better or worse."""
    folder = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(qwen2_folder)
    get_peft_model(base, LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear")).save_pretrained(folder)
    return folder


def order_for(folder: Path, model: Path, adapter: Path | None, examples: list[Example], **spec: Any) -> JobOrder:
    folder.mkdir(parents=True, exist_ok=True)
    shots = [example.model_copy(update={"id": f"shot{example.id}"}) for example in examples[:4]]
    asked = {"data": "rows", "adapter": "mine" if adapter else None, "max_new_tokens": 6, "shots": 2, "resamples": 200}
    return JobOrder(
        id="job_01J0",
        kind=JobKind.EVALUATION,
        spec={**asked, **spec},
        inputs={
            "model_name": "tiny",
            "model_folder": str(model),
            "adapter_name": "mine" if adapter else None,
            "adapter_folder": str(adapter) if adapter else None,
            "dataset_name": "rows",
            "examples_file": str(write_examples(folder / "test.jsonl", examples)),
            "shots_file": str(write_examples(folder / "train.jsonl", shots)),
        },
    )


@pytest.fixture(scope="module")
def finished(
    qwen2_folder: Path, adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluation, Path]:
    folder = tmp_path_factory.mktemp("job")
    order = order_for(folder, qwen2_folder, adapter_folder, signature_examples(12))
    return run(order, folder, Reporter(folder)), folder


def records_of(folder: Path) -> list[ExampleRecord]:
    lines = (folder / "evaluation" / "examples.jsonl").read_text(encoding="utf-8").splitlines()
    return [ExampleRecord.model_validate_json(line) for line in lines]


def test_base_prompted_base_and_adapter_are_measured_on_the_same_examples(finished: tuple[Evaluation, Path]) -> None:
    evaluation, _ = finished
    assert [condition.name for condition in evaluation.conditions] == ["base", "base + 2 examples", "mine"]
    assert {condition.examples for condition in evaluation.conditions} == {12}
    assert evaluation.id == "evaluation_01J0"
    for condition in evaluation.conditions:
        assert list(condition.metrics)[:4] == ["exact_match", "stopped", "token_accuracy", "loss"]
        for interval in condition.metrics.values():
            assert interval.low <= interval.mean <= interval.high


def test_the_adapter_is_off_for_the_base_and_on_for_itself(
    finished: tuple[Evaluation, Path], qwen2_folder: Path
) -> None:
    evaluation, folder = finished
    alone = folder / "alone"
    base_only = run(order_for(alone, qwen2_folder, None, signature_examples(12), shots=0), alone, Reporter(alone))
    assert base_only.conditions[0].metrics == evaluation.conditions[0].metrics
    assert base_only.comparisons == []
    assert evaluation.conditions[2].metrics["loss"] != evaluation.conditions[0].metrics["loss"]


def test_a_comparison_is_the_mean_of_the_paired_differences(finished: tuple[Evaluation, Path]) -> None:
    evaluation, folder = finished
    records = records_of(folder)
    for comparison in evaluation.comparisons:
        metric = comparison.metric.removesuffix("[2+ parameters]")
        of_group = [
            record
            for record in records
            if metric == comparison.metric or len(json.loads(record.reference)["parameters"]) >= 2
        ]
        differences = [
            record.metrics[comparison.treatment][metric] - record.metrics[comparison.baseline][metric]
            for record in of_group
        ]
        assert comparison.difference.mean == pytest.approx(np.mean(differences), abs=1e-12)
    assert len(evaluation.comparisons) == 2 * 2 * 4  # baselines, groups, metrics
    assert evaluation.settings["subgroups"] == {"2+ parameters": 8}


def test_the_folder_holds_the_evaluation_the_examples_and_the_report(finished: tuple[Evaluation, Path]) -> None:
    evaluation, folder = finished
    stored = Evaluation.model_validate_json((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert stored == evaluation
    assert [record.reference for record in records_of(folder)] == [row.answer() for row in signature_examples(12)]
    names = {path.name for path in (folder / "evaluation").iterdir()}
    assert names == {"evaluation.json", "examples.jsonl", "report.html", "manifest.json"}


def test_progress_and_metrics_are_told_as_events(finished: tuple[Evaluation, Path]) -> None:
    evaluation, folder = finished
    told = events(folder, "progress")
    assert {event["condition"] for event in told} == {"base", "base + 2 examples", "mine"}
    assert all(event["done"] <= event["total"] == 12 for event in told)
    assert len(events(folder, "metric")) == sum(len(condition.metrics) for condition in evaluation.conditions)
    assert [event["name"] for event in events(folder, "phase")][:3] == ["loading", "base: loss", "base: answers"]


def test_the_first_examples_by_id_are_measured_when_there_is_a_limit(tmp_path: Path, qwen2_folder: Path) -> None:
    order = order_for(tmp_path, qwen2_folder, None, signature_examples(6)[::-1], limit=2, shots=0)
    run(order, tmp_path, Reporter(tmp_path))
    assert [record.example_id for record in records_of(tmp_path)] == [f"{0:016x}", f"{1:016x}"]


def test_plain_texts_have_a_loss_and_no_answers(tmp_path: Path, qwen2_folder: Path, adapter_folder: Path) -> None:
    texts = [Example(id=f"{i}", group=f"{i}", row=i, text=f"The number {i} stands here.") for i in range(1, 6)]
    evaluation = run(order_for(tmp_path, qwen2_folder, adapter_folder, texts), tmp_path, Reporter(tmp_path))
    assert [condition.name for condition in evaluation.conditions] == ["base", "mine"]
    assert set(evaluation.conditions[0].metrics) == {"token_accuracy", "loss"}
    reason = evaluation.settings["few_shot"]["reason"]
    assert reason == "plain texts have no question in front of which examples could stand"
    assert reason in (tmp_path / "evaluation" / "report.html").read_text(encoding="utf-8")
    with pytest.raises(InvalidSpec, match="exact_match cannot be measured on plain texts"):
        run(order_for(tmp_path, qwen2_folder, None, texts, metrics=["exact_match"]), tmp_path, Reporter(tmp_path))


def test_only_the_last_answer_of_a_conversation_is_generated(tmp_path: Path, qwen2_folder: Path) -> None:
    first, second = counting_examples(2)
    both = first.model_copy(update={"messages": [*(first.messages or []), *(second.messages or [])]})
    run(order_for(tmp_path, qwen2_folder, None, [both], shots=0), tmp_path, Reporter(tmp_path))
    record = records_of(tmp_path)[0]
    assert record.reference == second.answer()
    assert first.answer() in record.prompt
    assert record.prompt.endswith("Count from 1.<|im_end|>\n<|im_start|>assistant\n")


def test_a_stopped_evaluation_leaves_no_results(tmp_path: Path, qwen2_folder: Path) -> None:
    reporter = Reporter(tmp_path)
    reporter.stop_requested = True
    with pytest.raises(Interrupted, match="stopped on request"):
        run(order_for(tmp_path, qwen2_folder, None, counting_examples(2)), tmp_path, reporter)
    assert not (tmp_path / "evaluation").exists()


def test_the_printed_command_asks_for_the_same_again() -> None:
    spec = EvaluationSpec(adapter="my adapter", data="rows", limit=5, metrics=["exact_match", "parses"])
    assert command(spec) == (
        "lorasmith eval 'my adapter' --data rows --part test --limit 5 --shots 3 --max-new-tokens 160 "
        "--batch-size 64 --resamples 10000 --seed 0 --metrics exact_match --metrics parses"
    )
    on_four_bits = EvaluationSpec(adapter="mine", data="rows", quantization="nf4", double_quantization=False)
    assert "--quantization nf4 --no-double-quantization" in command(on_four_bits)


class Page(HTMLParser):
    """Collects the tags of a page and fails on one that is closed out of order."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def page_of(folder: Path) -> Page:
    return Page((folder / "evaluation" / "report.html").read_text(encoding="utf-8"))


def test_the_report_asks_nothing_from_any_network(finished: tuple[Evaluation, Path]) -> None:
    page = page_of(finished[1])
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base"}
    assert not [attributes for _, attributes in page.tags if {"src", "href"} & attributes.keys()]
    html = (finished[1] / "evaluation" / "report.html").read_text(encoding="utf-8")
    assert "url(" not in html
    assert "@import" not in html


def test_text_of_examples_is_shown_and_never_run(finished: tuple[Evaluation, Path]) -> None:
    page = page_of(finished[1])
    assert HOSTILE in page.words
    assert "script" not in {tag for tag, _ in page.tags}


def test_the_report_says_the_verdict_the_command_and_the_settings(finished: tuple[Evaluation, Path]) -> None:
    evaluation, folder = finished
    words = page_of(folder).words
    assert evaluation.settings["verdict"]["sentence"] in words
    assert evaluation.settings["command"] in words
    assert "float32" in words
    assert "There are no records of a training run for this evaluation." in words


def test_charts_and_tables_can_be_read_aloud(finished: tuple[Evaluation, Path]) -> None:
    page = page_of(finished[1])
    charts = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(charts) == 3  # metrics and two lengths; no training events were given
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in charts)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert ("html", {"lang": "en"}) in page.tags


def test_a_report_can_be_made_again_from_the_stored_files(finished: tuple[Evaluation, Path]) -> None:
    _, folder = finished
    stored = Evaluation.model_validate_json((folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    assert report_html(stored, records_of(folder), None) == (folder / "evaluation" / "report.html").read_text("utf-8")


def test_the_loss_curve_takes_the_later_line_of_a_repeated_step(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    lines = [
        {"seq": 1, "type": "step", "data": {"step": 1, "loss": 9.0}},
        {"seq": 2, "type": "step", "data": {"step": 1, "loss": 3.0}},
        {"seq": 3, "type": "step", "data": {"step": 2, "loss": 2.0}},
        {"seq": 4, "type": "evaluation", "data": {"step": 2, "loss": 2.5}},
        {"seq": 5, "type": "phase", "data": {"name": "saving"}},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"seq": 6, "ty', encoding="utf-8")
    drawn = loss_curve(path)
    assert drawn is not None
    assert "training goes from 3.000 to 2.000; validation goes from 2.500 to 2.500" in drawn


@pytest.mark.parametrize("content", [None, "", '{"seq": 1, "type": "phase", "data": {}}\n'])
def test_there_is_no_curve_without_losses(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "events.jsonl"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert loss_curve(path) is None


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (0.0, 1.0), (2.31, 7.62), (0.0123, 0.0129), (0.0, 1200.0)])
def test_ticks_enclose_the_data_and_are_few(low: float, high: float) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    assert 2 <= len(marks) <= 8


def test_a_histogram_counts_every_value_once() -> None:
    drawn = histogram("Length", [1.0, 1.0, 2.0, 40.0], style="base", x_label="tokens")
    assert "4 examples, from 1 to 40, median 2" in drawn


def test_a_line_of_one_point_can_be_drawn() -> None:
    assert "<circle" in line_chart(
        "Loss", [Series("training", "adapter", [(1.0, 2.0)])], x_label="step", y_label="nats"
    )
