"""What is measured on one answer, how each metric is named in a report, and which way is better."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a metric is shown: a share of examples or tokens (0 to 1) as a percentage, a loss as it is."""

    title: str
    meaning: str
    higher_is_better: bool = True
    share: bool = True


METRICS = {
    "exact_match": Metric(
        "Exact match",
        "the answer equals the expected one, surrounding white space aside; equal JSON in another spelling does not count",
    ),
    "parses": Metric("Parses as Python", "the answer is not empty and Python's own parser accepts it"),
    "stopped": Metric("Stopped by itself", "the answer ended with a stop token, not at the length limit"),
    "token_accuracy": Metric(
        "Token accuracy",
        "trained tokens that the model ranks first when all earlier ones are given; mean over examples",
    ),
    "loss": Metric(
        "Loss", "nats per trained token of the expected answer; mean over examples", higher_is_better=False, share=False
    ),
}


def exact_match(answer: str, reference: str) -> bool:
    """Equal text, white space around it aside.

    Two texts that parse to the same JSON but are written differently do not match: the reference is what was asked for.
    """
    return answer.strip() == reference.strip()


def parses(answer: str) -> bool:
    """Whether Python's parser accepts the text and there is some. Nothing is executed."""
    if not answer.strip():
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an invalid escape in generated code is no news for the log
            ast.parse(answer)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def are_python(references: Sequence[str]) -> bool:
    """Whether every reference is code: it parses, spans lines or defines something, and is not JSON."""
    return bool(references) and all(
        parses(text) and ("\n" in text.strip() or "def " in text) and parsed_json(text) is None for text in references
    )


def parameter_count(reference: str) -> int | None:
    """Length of the list `parameters` when the reference is a JSON object that has one, else None."""
    value = parsed_json(reference)
    parameters = value.get("parameters") if isinstance(value, dict) else None
    return len(parameters) if isinstance(parameters, list) else None


def parsed_json(text: str) -> object | None:
    """The JSON value of a text, or None when it is not JSON (or is `null`)."""
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


def metric_parts(name: str) -> tuple[Metric, str]:
    """The metric behind a name and the subgroup in brackets: `loss[2+ parameters]` gives loss and `2+ parameters`."""
    plain, _, subgroup = name.partition("[")
    return METRICS[plain], subgroup.removesuffix("]")
