"""Review: what a person says of each candidate, and the dataset that comes of it.

Decisions stand in `reviews/JOB/decisions.jsonl`, one line each, and a later one replaces an earlier one.
"""

from __future__ import annotations

import getpass
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from lorasmith.endpoints import parse_endpoint
from lorasmith.errors import InvalidData, InvalidSpec, NotFound
from lorasmith.files import append_lines, disk_errors, sha256_file
from lorasmith.schemas.augmentation import (
    AugmentationInputs,
    AugmentationMethod,
    AugmentationSpec,
    Candidate,
    Decision,
    ReviewItem,
)
from lorasmith.schemas.data import PARTS, DataImportSpec, Dataset, DatasetFormat, Example, Part
from lorasmith.schemas.data_lineage import AppliedReviewSpec, StepInput
from lorasmith.schemas.jobs import Job
from lorasmith.services.augmentation import order_of, source_of
from lorasmith.services.augmentation_candidates import (
    augmented,
    candidates_of,
    replaced_text,
    request_of,
    review_folder,
    whole_lines,
)
from lorasmith.services.data import read_examples
from lorasmith.services.data_import import Origin, import_dataset
from lorasmith.services.data_versions import input_of
from lorasmith.services.data_writing import message_rows, preference_row
from lorasmith.services.workbench import Workbench

DECISIONS = "decisions.jsonl"


class Review:
    """The candidates of a job with what was decided so far."""

    def __init__(self, workbench: Workbench, job: Job) -> None:
        self.workbench = workbench
        self.job = job
        order = order_of(workbench, job)
        self.spec = AugmentationSpec.model_validate(order.spec)
        self.inputs = AugmentationInputs.model_validate(order.inputs)
        self.path = review_folder(workbench, job) / DECISIONS
        candidates, self.sources = candidates_of(workbench, job)
        self.candidates = {candidate.id: candidate for candidate in candidates}
        self.decisions: dict[str, Decision] = {}
        for line in whole_lines(self.path):
            decision = Decision.model_validate_json(line)
            self.decisions[decision.candidate] = decision

    def items(self) -> list[ReviewItem]:
        return [self.item(candidate) for candidate in self.candidates.values()]

    def item(self, candidate: Candidate) -> ReviewItem:
        source, decision = self.sources[candidate.example_id], self.decisions.get(candidate.id)
        decided = None if decision is None else "accepted" if decision.accepted else "rejected"
        return ReviewItem(
            state=decided or candidate.fate,
            candidate=candidate,
            decision=decision,
            request=request_of(source),
            source=replaced_text(source, self.spec.method),
        )

    def pending(self) -> list[ReviewItem]:
        return [item for item in self.items() if item.state == "pending"]

    def counts(self) -> dict[str, int]:
        """Candidates of each state; those that a check has rejected are counted by its reason."""
        states = Counter(
            f"rejected as {item.candidate.reason}" if item.candidate.reason and item.decision is None else item.state
            for item in self.items()
        )
        return dict(sorted(states.items()))

    def decide(self, ids: Sequence[str], *, accepted: bool, text: str | None = None) -> None:
        """Store a decision on each; also on candidates that a check has rejected, which a reviewer may overrule."""
        unknown = [one for one in ids if one not in self.candidates]
        if unknown:
            raise NotFound(
                f"no candidate {unknown[0]!r} in {self.job.id}", hint=f"lorasmith data review {self.job.id} lists them"
            )
        if text is not None and not text.strip():
            raise InvalidSpec("an accepted text must not be empty", hint="reject the candidate instead")
        made = [Decision(candidate=one, accepted=accepted, text=text, by=reviewer()) for one in ids]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_lines(self.path, [decision.model_dump_json(exclude_none=True) for decision in made])
        self.decisions.update({decision.candidate: decision for decision in made})

    def accept_all(self, min_score: float) -> int:
        """Accept each pending candidate from that score on; returns how many."""
        chosen = [item.candidate.id for item in self.pending() if item.candidate.score >= min_score]
        if chosen:
            self.decide(chosen, accepted=True)
        return len(chosen)

    def accepted(self) -> Iterator[Example]:
        """Each accepted candidate as an example, with where it comes from."""
        for item in self.items():
            if item.state == "accepted":
                assert item.decision is not None
                candidate = item.candidate
                made_by = candidate.made_by.model_copy(
                    update={"accepted_by": item.decision.by, "edited": item.decision.text is not None or None}
                )
                example = augmented(self.sources[candidate.example_id], self.spec.method, item.text)
                yield example.model_copy(update={"made_by": made_by})


def reviewer() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name
        return "unknown"


def apply_review(workbench: Workbench, review: Review, name: str) -> Dataset:
    """A new dataset through the import: the source's rows and the accepted ones, which are in train and in the groups of
    their sources; of `negative`, the accepted pairs alone."""
    accepted = list(review.accepted())
    if not accepted:
        raise InvalidData(
            f"nothing of {review.job.id} is accepted, so there is no dataset to make",
            hint=f"lorasmith data review {review.job.id} --accept ID, or --accept-all",
        )
    source = source_of(workbench, review.inputs)
    preferences = review.spec.method is AugmentationMethod.NEGATIVE
    rows: Iterator[dict[str, Any]]
    if preferences:
        rows = map(pair_row, accepted)
    else:
        added = ({**message_rows(example), **place(example, "train")} for example in accepted)
        rows = chain(rows_of_source(lambda part: read_examples(workbench, source, part)), added)
    format = DatasetFormat.PREFERENCE if preferences else DatasetFormat.CHATML
    path = write_rows(review.path.parent, rows)
    origin = origin_of(workbench, review, source, accepted, path)
    return import_dataset(workbench, path, DataImportSpec(name=name, format=format), origin=origin)


def origin_of(workbench: Workbench, review: Review, source: Dataset, accepted: list[Example], path: Path) -> Origin:
    """What the lineage says of the rows in that file."""
    made_by = [example.made_by for example in accepted if example.made_by]
    spec = AppliedReviewSpec(
        method=review.spec.method.value,
        teacher=review.spec.teacher.model,
        host=parse_endpoint(review.spec.teacher.endpoint).host,
        job=review.job.id,
        accepted=len(accepted),
        edited=sum(bool(one.edited) for one in made_by),
        accepted_by=sorted({one.accepted_by for one in made_by if one.accepted_by}),
    )
    name = path.relative_to(workbench.home).as_posix()
    rows = StepInput(kind="review", name=name, sha256=sha256_file(path), id=review.job.id)
    return Origin(source.lineage, "augment", spec.model_dump(), [input_of(source), rows])


def rows_of_source(examples_of: Callable[[Part], Iterator[Example]]) -> Iterator[dict[str, Any]]:
    for part in PARTS:
        for example in examples_of(part):
            yield {**message_rows(example), **place(example, part)}


def pair_row(example: Example) -> dict[str, Any]:
    return {**preference_row(example), **place(example, "train")}


def place(example: Example, part: str) -> dict[str, Any]:
    made_by = {"made_by": example.made_by.model_dump(mode="json", exclude_none=True)} if example.made_by else {}
    return {"group": example.group, "split": part, **made_by}


def row_line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_rows(folder: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """A file named after its content: the source of the dataset, which later reviews leave as it is."""
    temporary = folder / "rows.tmp"
    try:
        with disk_errors(folder):
            with temporary.open("w", encoding="utf-8", newline="\n") as file:
                file.writelines(map(row_line, rows))
            return temporary.replace(folder / f"rows-{sha256_file(temporary)[:16]}.jsonl")
    finally:
        temporary.unlink(missing_ok=True)
