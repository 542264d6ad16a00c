"""Counts and lengths of a dataset's examples, gathered one at a time: what is kept is one count for each length."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lorasmith.schemas.data import PARTS, Part
from lorasmith.schemas.statistics import nearest_ranks


class PartStatistics:
    """Takes stored examples. A turn is a message that is no system prompt; a text is one turn without a prompt."""

    def __init__(self) -> None:
        self.sizes: Counter[Part] = Counter()
        self.roles: Counter[str] = Counter()
        self.turns: Counter[int] = Counter()
        self.prompts: Counter[int] = Counter()
        self.answers: Counter[int] = Counter()
        self.made_by: Counter[str] = Counter()

    def add(self, values: dict[str, Any], part: Part) -> None:
        messages: list[dict[str, Any]] = [*values.get("messages", ()), *values.get("chosen", ())]
        self.sizes[part] += 1
        if origin := values.get("made_by"):
            self.made_by[f"{origin['method']} by {origin['teacher']} at {origin['host']}"] += 1
        self.roles.update(message["role"] for message in messages)
        self.turns[sum(message["role"] != "system" for message in messages) or 1] += 1
        if not messages:
            self.prompts[0] += 1
            self.answers[len(values["text"])] += 1
            return
        last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
        self.prompts[sum(len(message["content"]) for message in messages[:last])] += 1
        self.answers[len(messages[last]["content"])] += 1

    def part_sizes(self) -> dict[Part, int]:
        return {part: self.sizes[part] for part in PARTS}

    def result(self) -> dict[str, Any]:
        return {
            "examples": self.sizes.total(),
            "turns": {"mean": round(mean(self.turns), 2), "max": max(self.turns)},
            "characters": {"prompt": describe_lengths(self.prompts), "answer": describe_lengths(self.answers)},
            "roles": dict(self.roles),
            **({"made_by": dict(self.made_by)} if self.made_by else {}),
        }


def mean(counts: Counter[int]) -> float:
    return sum(length * count for length, count in counts.items()) / counts.total()


def describe_lengths(counts: Counter[int]) -> dict[str, float]:
    """Mean, median, 95th percentile (nearest rank) and maximum."""
    return {
        "mean": round(mean(counts), 1),
        **{f"p{percent}": rank for percent, rank in nearest_ranks(counts, (50, 95)).items()},
        "max": max(counts),
    }
