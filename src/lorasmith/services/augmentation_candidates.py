"""Texts of a teacher as candidates: each one held against its source, the other texts and the held-out rows.

What has been judged stands in `reviews/JOB/candidates.jsonl` and is not judged again; rows that a resumed job has brought
since are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from lorasmith.endpoints import parse_endpoint
from lorasmith.files import write_text
from lorasmith.schemas.augmentation import (
    AugmentationInputs,
    AugmentationMethod,
    AugmentationSpec,
    AugmentedRow,
    Candidate,
    CandidateReason,
)
from lorasmith.schemas.data import Example, MadeBy, Message, Part
from lorasmith.schemas.jobs import Job
from lorasmith.services.augmentation import order_of, source_of
from lorasmith.services.data import read_examples
from lorasmith.services.data_checks import UNKNOWN, LanguageCheck
from lorasmith.services.data_duplicates.contamination import Text, contaminated, read_items
from lorasmith.services.data_duplicates.shingles import Shingling, shingles_of
from lorasmith.services.data_duplicates.similarity import against_one
from lorasmith.services.data_duplicates.texts import digest, folded
from lorasmith.services.data_text import find_control_character, find_mojibake
from lorasmith.services.workbench import Workbench

ROWS, CANDIDATES = "rows.jsonl", "candidates.jsonl"
HELD_OUT: tuple[Part, ...] = ("val", "test")
SHORTEST_REASONING = 20  # characters
SHORTEST_SHARE = 0.2  # of the request's length, of another wording of it
LONGEST_SHARE, LONGEST_MORE = 4, 200  # times the request's length, and characters on top


def review_folder(workbench: Workbench, job: Job) -> Path:
    return workbench.path(f"reviews/{job.id}")


def candidates_of(workbench: Workbench, job: Job) -> tuple[list[Candidate], dict[str, Example]]:
    """Every candidate of a job, in the order of the rows, and their sources by id."""
    path = review_folder(workbench, job) / CANDIDATES
    found = [Candidate.model_validate_json(line) for line in whole_lines(path)]
    order = order_of(workbench, job)
    spec, inputs = AugmentationSpec.model_validate(order.spec), AugmentationInputs.model_validate(order.inputs)
    answered = answered_rows(workbench.path(job.folder))
    judged = {candidate.example_id for candidate in found}
    dataset = source_of(workbench, inputs)
    sources: dict[str, Example] = {}
    requests: set[bytes] = set()  # of all rows of train
    for example in read_examples(workbench, dataset, "train"):
        if example.id in answered:
            sources[example.id] = example
        if spec.method.rewords:
            requests.add(digest(folded(request_of(example))))
    new = [row for example_id, row in answered.items() if example_id not in judged]
    if new:
        judge = Judge(spec, job, requests, texts={digest(folded(candidate.text)) for candidate in found})
        judged_now = [
            candidate
            for row in sorted(new, key=lambda one: one.row)
            for candidate in judge.candidates(row, sources[row.example_id])
        ]
        if spec.method.rewords:
            held_out = [example for part in HELD_OUT for example in read_examples(workbench, dataset, part)]
            reject_leaks(judged_now, sources, held_out)
        found += judged_now
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(candidate.model_dump_json(exclude_none=True) + "\n" for candidate in found))
    return sorted(found, key=lambda one: (one.row, int(one.id.partition(".")[2]))), sources


def answered_rows(folder: Path) -> dict[str, AugmentedRow]:
    rows = {row.example_id: row for row in map(AugmentedRow.model_validate_json, whole_lines(folder / ROWS))}
    return {example_id: row for example_id, row in rows.items() if row.fate == "answered"}


def whole_lines(path: Path) -> Iterator[str]:
    """The lines of a file that may be missing, or still be written to."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="\n") as lines:
        yield from (line for line in lines if line.endswith("\n"))


def request_of(example: Example) -> str:
    return next((message.content for message in reversed(example.messages or []) if message.role == "user"), "")


def replaced_text(example: Example, method: AugmentationMethod) -> str:
    """What a candidate takes the place of, or stands before."""
    return request_of(example) if method.rewords else example.answer()


def augmented(example: Example, method: AugmentationMethod, text: str) -> Example:
    """The example with a candidate's text in it; `id`, `row` and `group` stay those of the source."""
    messages = [message.model_copy() for message in example.messages or []]
    if method is AugmentationMethod.NEGATIVE:
        rejected = [Message(role="assistant", content=text)]
        return example.model_copy(update={"messages": messages[:-1], "chosen": messages[-1:], "rejected": rejected})
    if method is AugmentationMethod.EXPAND:
        messages[-1].content = f"{text}\n\n{messages[-1].content}"
    else:
        last = max(index for index, message in enumerate(messages) if message.role == "user")
        messages[last].content = text
    return example.model_copy(update={"messages": messages})


@dataclass
class Judge:
    """What texts are held against. `requests` are digests of all requests of train."""

    spec: AugmentationSpec
    job: Job
    requests: set[bytes]
    texts: set[bytes]  # digests of candidates, also of other rows
    language: LanguageCheck | None = None

    def __post_init__(self) -> None:
        if find_spec("py3langid") is not None:
            self.language = LanguageCheck([])

    def candidates(self, row: AugmentedRow, source: Example) -> Iterator[Candidate]:
        earlier = [folded(replaced_text(source, self.spec.method))]
        for number, text in enumerate(row.texts, start=1):
            similarity = greatest_similarity(folded(text), earlier)
            verdict = self.fault(text, similarity, source)
            earlier.append(folded(text))
            self.texts.add(digest(folded(text)))
            yield Candidate(
                id=f"{row.row}.{number}",
                row=row.row,
                example_id=row.example_id,
                text=text,
                fate="rejected" if verdict else "pending",
                reason=verdict[0] if verdict else None,
                sentence=verdict[1] if verdict else None,
                similarity=round(similarity, 4),
                score=round(1.0 - similarity, 4),
                made_by=self.origin(row),
            )

    def origin(self, row: AugmentedRow) -> MadeBy:
        return MadeBy(
            method=self.spec.method.value,
            teacher=self.spec.teacher.model,
            host=parse_endpoint(self.spec.teacher.endpoint).host,
            source=row.example_id,
            prompt=row.prompt,
            job=self.job.id,
            time=row.time,
        )

    def fault(self, text: str, similarity: float, source: Example) -> tuple[CandidateReason, str] | None:
        """Why a text cannot be used: a reason and a sentence."""
        method = self.spec.method
        old = replaced_text(source, method)
        same = digest(folded(text))
        if folded(text) == folded(old):
            return "identical", "it says what its source says"
        broken = find_control_character(text) or find_mojibake(text)
        if broken:
            return "broken-text", f"it holds {broken}"
        if method.rewords and same in self.requests:
            return "identical", "another row of train asks the same"
        if similarity == 1.0 or (method.rewords and same in self.texts):
            return "says-it-twice", "an earlier candidate says the same"
        if similarity >= self.spec.max_similarity:
            return "too-similar", f"similarity {similarity:.2f}, expected below {self.spec.max_similarity:g}"
        return self.wrong_length(text, old) or self.wrong_language(text, old)

    def wrong_length(self, text: str, old: str) -> tuple[CandidateReason, str] | None:
        if self.spec.method is AugmentationMethod.EXPAND and len(text) < SHORTEST_REASONING:
            return "too-short", f"{len(text)} characters of reasoning, expected at least {SHORTEST_REASONING}"
        if not self.spec.method.rewords:
            return None
        if len(text) < SHORTEST_SHARE * len(old):
            return "too-short", f"{len(text)} characters for {len(old)} of its source"
        if len(text) > LONGEST_SHARE * len(old) + LONGEST_MORE:
            return "too-long", f"{len(text)} characters for {len(old)} of its source"
        return None

    def wrong_language(self, text: str, old: str) -> tuple[CandidateReason, str] | None:
        if self.language is None:
            return None
        found, expected = self.language.language_of(text), self.language.language_of(old)
        if UNKNOWN in (found, expected) or found == expected:
            return None
        return "wrong-language", f"it is in {found}, its source in {expected}"


def reject_leaks(candidates: list[Candidate], sources: dict[str, Example], held_out: list[Example]) -> None:
    """Reject those that ask what a held-out row asks, unless their source asks it already."""
    items = read_items(Text(one.row, request_of(one)) for one in held_out)
    pending = [candidate for candidate in candidates if candidate.fate == "pending"]
    asked_already = {one.example_id: request_of(sources[one.example_id]) for one in pending}
    held = {(hit.row, hit.item) for hit in contaminated((Text(*one) for one in asked_already.items()), items)}
    by_id = {candidate.id: candidate for candidate in pending}
    for hit in contaminated((Text(one.id, one.text) for one in pending), items):
        candidate = by_id[str(hit.row)]
        if (candidate.example_id, hit.item) not in held:
            candidate.fate, candidate.reason = "rejected", "leaks"
            candidate.sentence = f"it asks what row {hit.item} asks, which is held out"


def greatest_similarity(text: str, others: list[str]) -> float:
    """Jaccard similarity of sets of word 3-grams, of a folded text with the nearest of others."""
    shingles, _ = shingles_of([text, *others], Shingling(), [0] * (1 + len(others)))
    return float(against_one(shingles[0], shingles.take(np.arange(1, len(shingles)))).max())
