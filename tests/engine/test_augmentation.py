"""An augmentation job asks about the right part of each row, and every row has a fate."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from lorasmith.engine.augmentation.rows import why_not
from lorasmith.engine.teachers.ledger import REQUESTS
from lorasmith.schemas.augmentation import (
    AugmentationMethod,
)
from lorasmith.schemas.data import Example, Message, ToolCall, ToolFunction
from tests.engine.augmentation_cases import example, job, lines, rows_of, run_here
from tests.teacher_stub import Reply, Stub, completion, error, material_of, subject_of


@pytest.mark.parametrize("method", list(AugmentationMethod))
def test_each_method_asks_about_its_part_of_the_row(tmp_path: Path, stub: Stub, method: AugmentationMethod) -> None:
    system = Message(role="system", content="Be brief.")
    row = example(1)
    row.messages = [system, *(row.messages or [])]
    language = {"language": "de"} if method is AugmentationMethod.BACK_TRANSLATE else {}
    folder = job(tmp_path / "job", stub, [row], method=method.value, n=2, **language)
    result = run_here(folder)
    question, answer = row.messages[1].content, row.messages[2].content
    asked = [material_of(request) for request in stub.requests]
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    there = f"En français, s'il vous plaît: {question}"
    assert (
        asked
        == {
            AugmentationMethod.REPHRASE: [{"before": conversation[:1], "request": question, "answer": answer}],
            AugmentationMethod.EXPAND: [{"conversation": conversation, "answer": answer}],
            AugmentationMethod.NEGATIVE: [{"conversation": conversation, "answer": answer}],
            AugmentationMethod.BACK_TRANSLATE: [{"text": question}, {"text": there}],
        }[method]
    )
    if method is AugmentationMethod.BACK_TRANSLATE:
        tasks = [request["messages"][0]["content"] for request in stub.requests]
        assert "code `de`" in tasks[0]
        assert "code `en`" in tasks[1]  # the language that the teacher has named
    assert len(rows_of(folder)[1]["texts"]) == 2
    assert result.rows == {"answered": 1, "rejected": 0, "failed": 0, "skipped": 0}


def test_rows_that_a_method_cannot_use_are_skipped_with_the_reason(tmp_path: Path, stub: Stub) -> None:
    text = Example(id="a", group="g", row=1, text="plain")
    unasked = Example(id="b", group="g", row=2, messages=[Message(role="assistant", content="Hello.")])
    call = ToolCall(function=ToolFunction(name="look", arguments={}))
    calling = example(3)
    assert calling.messages is not None
    calling.messages[-1] = Message(role="assistant", content="", tool_calls=[call])
    unweighted = example(4)
    assert unweighted.messages is not None
    unweighted.messages[-1].weight = 0
    folder = job(tmp_path / "job", stub, [text, unasked, calling, unweighted, example(5), example(6)], max_rows=2)
    result = run_here(folder)
    assert result.rows == {"answered": 2, "rejected": 0, "failed": 0, "skipped": 2}  # 3 and 4 have a request
    assert rows_of(folder)[1]["sentence"] == "a plain text has no request and no answer"
    assert rows_of(folder)[2]["sentence"] == "it has no request"
    assert why_not(calling, AugmentationMethod.EXPAND) == "it does not end with an answer in words"
    assert why_not(unweighted, AugmentationMethod.NEGATIVE) == "its answer is read and not trained (weight 0)"
    with_tools = example(7).model_copy(update={"tools": [{}]})
    assert why_not(with_tools, AugmentationMethod.NEGATIVE) == "preferences hold no tools"
    assert why_not(with_tools, AugmentationMethod.EXPAND) is None


def test_a_translation_between_one_language_is_rejected(tmp_path: Path, stub: Stub) -> None:
    stub.rule = lambda request, before: Reply(body=completion({"language": "fr", "texts": ["Bonjour"]}))
    folder = job(tmp_path / "job", stub, [example(1)], method="back-translate", language="fr")
    assert run_here(folder).rows["rejected"] == 1
    assert rows_of(folder)[1]["sentence"] == "the request is in fr already, the language between"
    assert sum(stub.asked.values()) == 1


def test_every_row_has_its_fate_whatever_the_endpoint_does(tmp_path: Path, stub: Stub) -> None:
    """24 rows with eight faults in the order of a seed; passing ones are gone at the second attempt."""
    chance = random.Random(7)
    kinds = ["fine", "429", "500", "hang", "cut", "not-json", "no-choices", "400"]
    drawn = chance.sample(3 * kinds, 24)
    fault_of = {example(n).messages[0].content: fault for n, fault in enumerate(drawn, 1)}  # type: ignore[index]

    def rule(request: dict[str, Any], before: int) -> Reply | None:
        first = before == 0
        return {
            "fine": None,
            "429": error(429, "slow", retry_after="0.01") if first else None,
            "500": error(500, "boom") if first else None,
            "hang": Reply(body=completion("x"), hang_s=4.0) if first else None,
            "cut": Reply(body=completion("x" * 100), cut=50) if first else None,
            "not-json": Reply(body=completion("I would rather not.")),
            "no-choices": Reply(body=b'{"choices": []}'),
            "400": error(400, "too long for me"),
        }[fault_of[subject_of(request)]]

    stub.rule = rule
    rows = [example(n) for n in range(1, 25)]
    folder = job(tmp_path / "job", stub, rows, teacher={"timeout_s": 1.0, "concurrency": 8, "max_attempts": 20})
    result = run_here(folder)
    fates = {"not-json": "rejected", "no-choices": "rejected", "400": "failed"}
    expected = {n: fates.get(fault_of[one.messages[0].content], "answered") for n, one in enumerate(rows, 1)}  # type: ignore[index]
    assert {row: line["fate"] for row, line in rows_of(folder).items()} == expected
    assert set(expected.values()) == {"answered", "rejected", "failed"}
    reasons = {line.get("reason") for line in rows_of(folder).values()}
    assert reasons == {None, "not-json", "empty", "refused-by-endpoint"}
    assert result.requests == sum(line["event"] == "asked" for line in lines(folder / REQUESTS))
    assert result.requests >= sum(stub.asked.values())  # some went over connections that the stub had closed
    stub.rule = None  # the endpoint has been mended: a second run asks for the failed rows alone
    before = stub.asked.copy()
    assert run_here(folder).rows["failed"] == 0
    again = {subject for subject, count in stub.asked.items() if count > before[subject]}
    assert again == {subject for subject, fault in fault_of.items() if fault == "400"}
