"""The main job end to end on what is built in: import, train, evaluate, export, answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from lorasmith.schemas.adapters import Adapter, ExportResult, ExportSpec
from lorasmith.schemas.data import Dataset, Example
from lorasmith.schemas.evaluation import Evaluation, EvaluationSpec
from lorasmith.schemas.serving import GenerationSpec
from lorasmith.services.adapters_export import export_adapter
from lorasmith.services.data import read_examples
from lorasmith.services.data_sources import find_dataset
from lorasmith.services.evaluation import evaluate
from lorasmith.services.jobs import Watch
from lorasmith.services.serving import Conversation
from lorasmith.services.training import build_spec, start_training, train
from lorasmith.services.workbench import Workbench

DATASET = "signatures"
MODEL = "starter"
HEADERS = 256  # of the test part: a minute of answers, and an interval of four points to each side
MAX_ANSWER_TOKENS = 160  # the longest reference answer of the test part has 152

WatchFactory = Callable[[str], AbstractContextManager[Watch]]


@dataclass(frozen=True)
class Demonstration:
    """What the demo made; paths are absolute."""

    dataset: Dataset
    adapter: Adapter
    adapter_folder: Path
    evaluation: Evaluation
    report: Path
    export: ExportResult
    example: Example
    answers: dict[str, str]


def run_demo(workbench: Workbench, watch: WatchFactory) -> Demonstration:
    """Each stage is what the command of the same name does; a later run makes another adapter."""
    dataset = find_dataset(workbench, DATASET)
    spec = build_spec({"model": MODEL, "data": DATASET, "preset": "tiny", "training": {"num_epochs": 1}})
    with watch("train") as view:
        adapter = train(workbench, start_training(workbench, spec), view)
    evaluation_spec = EvaluationSpec(
        adapter=adapter.name, data=DATASET, limit=HEADERS, max_new_tokens=MAX_ANSWER_TOKENS
    )
    with watch("eval") as view:
        evaluation = evaluate(workbench, evaluation_spec, view)
    with watch("export") as view:
        export = export_adapter(workbench, ExportSpec(adapter=adapter.name, kind="gguf"), view)
    example = telling_example(read_examples(workbench, dataset, "test"))
    asked = {
        "base": Conversation(workbench, GenerationSpec(model=MODEL, max_new_tokens=60)),
        adapter.name: Conversation(workbench, GenerationSpec(adapter=adapter.name)),
    }
    answers = {name: answer(conversation, example) for name, conversation in asked.items()}
    folder = workbench.path(evaluation.folder)
    return Demonstration(
        dataset, adapter, workbench.path(adapter.folder), evaluation, folder / "report.html", export, example, answers
    )


def telling_example(examples: Iterator[Example]) -> Example:
    """The first test row with three or more parameters and a default, so that a person sees what is asked for."""
    return next(
        example
        for example in examples
        if example.answer().count('", "') >= 2 and not example.answer().endswith('"defaults": {}}')
    )


def answer(conversation: Conversation, example: Example) -> str:
    messages = [message.model_dump() for message in example.prompt_messages()]
    text = "".join(reply.get("text", "") for reply in conversation.ask(messages))
    conversation.close()
    return text
