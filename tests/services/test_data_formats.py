"""What a file is, from its columns, and why."""

from __future__ import annotations

import pytest

from lorasmith.errors import InvalidData
from lorasmith.schemas.data import DatasetFormat
from lorasmith.services.data_formats import detect_format


@pytest.mark.parametrize(
    ("columns", "format", "reason"),
    [
        (["instruction", "input", "output"], "alpaca", "it has `instruction` and `output`"),
        (["output", "instruction"], "alpaca", "it has `instruction` and `output`"),
        (["conversations", "id"], "sharegpt", "it has `conversations`; not used: `id`"),
        (["messages", "group", "split", "source"], "chatml", "it has `messages`"),
        (["text"], "completion", "it has `text`"),
        (["task", "agent", "execution"], "interactions", "it has `task` and `execution`"),
        (["input", "output"], "chat", "it has `input` and `output`"),
        (["prompt", "completion"], "chat", "it has `prompt` and `completion`"),
        (["question", "answer", "score"], "chat", "it has `question` and `answer`; not used: `score`"),
        (["text", "label"], "classification", "it has `text` and `label`"),
        (["text", "category"], "classification", "it has `text` and `category`"),
        (["text", "summary"], "summarization", "it has `text` and `summary`"),
    ],
)
def test_the_columns_tell_the_format(columns: list[str], format: str, reason: str) -> None:
    detection = detect_format([dict.fromkeys(columns)])
    assert (detection.format, detection.reason) == (format, reason)


def test_a_wanted_format_wins_over_the_columns() -> None:
    detection = detect_format([{"text": "a", "label": "b"}], wanted=DatasetFormat.COMPLETION)
    assert (detection.format, detection.reason) == ("completion", "it was asked for")


def test_unknown_columns_are_listed_with_the_accepted_ones() -> None:
    with pytest.raises(InvalidData) as caught:
        detect_format([{"instuction": "a"}, {"respons": "b"}], file="a.csv")
    assert caught.value.message == (
        "a.csv has the columns instuction, respons, expected one of: prompt + chosen + rejected (preference); "
        "instruction + chosen + rejected (preference); input + preferred_output + non_preferred_output (preference); "
        "chosen + rejected (preference); prompt + completion + label (kto); messages (chatml); conversations (sharegpt); "
        "task + execution (interactions); instruction + output (alpaca); input + output (chat); "
        "prompt + completion (chat); question + answer (chat); text + label (classification); "
        "text + category (classification); text + summary (summarization); text (completion); "
        "did you mean 'instruction' for 'instuction'?"
    )


def test_a_wanted_format_needs_its_columns() -> None:
    with pytest.raises(InvalidData) as caught:
        detect_format([{"question": "a", "Answer": "b"}], file="a.csv", wanted=DatasetFormat.CHAT)
    assert caught.value.message == (
        "a.csv has the columns question, Answer; the format chat needs input + output or prompt + completion or "
        "question + answer; did you mean 'answer' for 'Answer'?"
    )


def test_a_row_without_its_answer_does_not_change_what_the_file_is() -> None:
    assert detect_format([{"text": "a", "label": "b"}, {"text": "c"}]).format == "classification"


def test_one_odd_row_does_not_change_what_the_file_is() -> None:
    assert detect_format([{"text": "a"}, {"text": "b"}, {"messages": []}]).format == "completion"


def test_rows_that_mostly_lack_their_answer_are_still_recognised() -> None:
    rows = [{"input": "a"}, {"input": "b"}, {"input": "c", "output": "d"}]
    assert detect_format(rows).format == detect_format(rows, wanted=DatasetFormat.CHAT).format == "chat"
