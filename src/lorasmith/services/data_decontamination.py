"""Taking rows out that hold what a model will be tested on: items of a benchmark, or rows of val and test in train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.errors import InvalidData
from lorasmith.files import verify_manifest
from lorasmith.schemas.data import Example, Part
from lorasmith.schemas.data_lineage import DecontaminationSpec, StepInput
from lorasmith.schemas.duplicates import HeldItem
from lorasmith.services.data_benchmark import Item, items_of
from lorasmith.services.data_duplicates.contamination import DEFAULT_SIMILARITY
from lorasmith.services.data_duplicates.leaks import held_items
from lorasmith.services.data_duplicates.signatures import rows_per_band
from lorasmith.services.data_parts import lines
from lorasmith.services.data_progress import Report, silent
from lorasmith.services.data_reading import Source
from lorasmith.services.data_redeciding import Redecision, decide_again, undecided
from lorasmith.services.data_sources import file_named, named_dataset
from lorasmith.services.data_versions import require_version

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench

HELD_OUT: tuple[Part, ...] = ("val", "test")


def decontaminate(
    workbench: Workbench,
    name: str,
    benchmark: str | None,
    similarity: float = DEFAULT_SIMILARITY,
    column_map: Mapping[str, str] | None = None,
    *,
    new_name: str | None = None,
    report: Report = silent,
) -> Redecision:
    """A version without the rows that hold an item of the benchmark, whatever part they are in; without a benchmark,
    without the rows of train that hold a row of val or test. They stay out when the version is decided anew.

    Raises `InvalidSpec` for a similarity outside 0.4 to 1.
    """
    rows_per_band(similarity)
    before = require_version(workbench, name)
    inputs = [benchmark_input(workbench, benchmark)] if benchmark is not None else []
    spec = DecontaminationSpec(
        benchmark=inputs[0].name if inputs else None, similarity=similarity, column_map=dict(column_map or {})
    )
    verify_manifest(workbench.path(before.folder))
    leaks = leaking_rows(workbench, workbench.path(before.folder), spec)
    after = decide_again(
        workbench, before, "decontaminate", spec.model_dump(), new_name, report, leaks=leaks, inputs=inputs
    )
    return Redecision(before, after)


def benchmark_input(workbench: Workbench, benchmark: str) -> StepInput:
    """By a name that still means it elsewhere and later: an absolute path, or a version."""
    path = file_named(workbench, benchmark)
    if path is not None:
        return StepInput(kind="benchmark", name=str(path.resolve()), sha256=Source.open(path).digest())
    dataset = named_dataset(workbench, benchmark)
    return StepInput(kind="benchmark", name=dataset.reference, sha256=dataset.sha256, id=dataset.id)


def leaking_rows(workbench: Workbench, stored: Path, spec: DecontaminationSpec) -> dict[int, str]:
    """Input row of a version → what it holds, such as `bench.jsonl item 3 (exact)` or `test row 7 (similar 0.85)`."""
    if spec.benchmark is not None:
        items = list(items_of(workbench, spec.benchmark, spec.column_map))
        hits, _ = held_items(lambda: rows_that_may_stay(stored), items, spec.similarity)
        return strongest_of_rows(f"{Path(spec.benchmark).name} item", hits)
    found: dict[int, str] = {}
    for part in HELD_OUT:
        held_out = list(map(Item, part_of(stored, part)))
        hits, _ = held_items(lambda: part_of(stored, "train"), held_out, spec.similarity)
        found = strongest_of_rows(f"{part} row", hits) | found
    return found


def rows_that_may_stay(stored: Path) -> Iterator[Example]:
    """Also those that were set aside as near duplicates, which another threshold brings back."""
    return (example for line, example in undecided(stored) if example is not None and line.leaks_into is None)


def part_of(stored: Path, part: Part) -> Iterator[Example]:
    return map(Example.model_validate_json, lines(stored / f"{part}.jsonl"))


def strongest_of_rows(what: str, hits: Iterable[HeldItem]) -> dict[int, str]:
    strength = ("exact", "words", "similar")
    best: dict[int, HeldItem] = {}
    for hit in hits:
        best[hit.row] = min(best.get(hit.row, hit), hit, key=lambda one: (strength.index(one.kind), one.item))
    return {row: f"{what} {place_of(hit)} ({kind_of(hit)})" for row, hit in best.items()}


def place_of(hit: HeldItem) -> str:
    return str(hit.item) if hit.element is None else f"{hit.item} {hit.element}"


def kind_of(hit: HeldItem) -> str:
    return hit.kind if hit.similarity is None else f"{hit.kind} {hit.similarity:.2f}"


def changed_benchmark(workbench: Workbench, recorded: list[StepInput]) -> str | None:
    """Why a step cannot give what it gave. Raises `InvalidData` for a benchmark that is not there any more."""
    for one in recorded:
        if one.kind != "benchmark":
            continue
        if one.id is None and not Path(one.name).exists():
            raise InvalidData(
                f"the benchmark {one.name}, by which rows were taken out, is not there any more",
                hint="put it back where it was, or replay the version before",
            )
        sha256 = benchmark_input(workbench, one.name).sha256
        if sha256 != one.sha256:
            return f"the benchmark {one.name} changed: its sha256 was {one.sha256}, now it is {sha256}"
    return None
