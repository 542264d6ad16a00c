"""Rows of a part that hold what a model will be tested on: items of a benchmark, or of the dataset's own other parts.

Questions are compared with questions, so that a question is found whatever its answer, and whole rows with whole rows,
so that an item is found anywhere in a row. Neither has a system prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

from lorasmith.schemas.data import Example, Part
from lorasmith.schemas.duplicates import ContaminationReport, HeldItem
from lorasmith.services.data import read_examples
from lorasmith.services.data_duplicates.contamination import DEFAULT_SIMILARITY, Text, contaminated, read_items
from lorasmith.services.data_duplicates.examples import row_of, whole_text
from lorasmith.services.data_duplicates.signatures import rows_per_band
from lorasmith.services.data_sources import named_dataset
from lorasmith.services.data_writing import examples_of
from lorasmith.services.workbench import Workbench

STRENGTH = {"exact": 0, "words": 1, "similar": 2}
Compared = Literal["question", "whole"]
TEXT_OF: dict[Compared, Callable[[Example], str]] = {
    "question": lambda example: row_of(example).instruction,
    "whole": whole_text,
}


def find_contamination(
    workbench: Workbench,
    name: str,
    benchmark: str,
    part: Part = "train",
    similarity: float = DEFAULT_SIMILARITY,
    column_map: Mapping[str, str] | None = None,
) -> ContaminationReport:
    """Items of a benchmark in a part. The benchmark is a dataset, all parts of it, or a file, which is not imported;
    `column_map` says which of its columns are the fields of a format: `{"text": "prompt"}` looks for the prompts."""
    rows_per_band(similarity)
    items = (example for example, _ in examples_of(workbench, benchmark, column_map))
    return search(workbench, name, part, benchmark, items, similarity)


def find_leakage(workbench: Workbench, name: str, similarity: float = DEFAULT_SIMILARITY) -> list[ContaminationReport]:
    """Rows of val and of test in train."""
    rows_per_band(similarity)
    dataset = named_dataset(workbench, name)
    held_out: tuple[Part, ...] = ("val", "test")
    return [
        search(workbench, dataset.name, "train", part, read_examples(workbench, dataset, part), similarity)
        for part in held_out
    ]


def search(
    workbench: Workbench, name: str, part: Part, benchmark: str, wanted: Iterable[Example], similarity: float
) -> ContaminationReport:
    """Items are held in memory, rows pass by twice."""
    dataset = named_dataset(workbench, name)
    items = list(wanted)
    hits, templates = held_items(lambda: read_examples(workbench, dataset, part), items, similarity)
    of_item: dict[int, str] = {}
    for one in hits:
        of_item[one.item] = min(of_item.get(one.item, one.kind), one.kind, key=STRENGTH.__getitem__)
    counts = Counter(of_item.values())
    return ContaminationReport(
        dataset=dataset.name,
        part=part,
        benchmark=benchmark,
        rows=dataset.part_sizes[part],
        items=len(items),
        held=len(of_item),
        exact=counts["exact"],
        words=counts["words"],
        similar=counts["similar"],
        templates=templates,
        hits=hits,
    )


def held_items(
    rows: Callable[[], Iterable[Example]], items: list[Example], similarity: float
) -> tuple[list[HeldItem], int]:
    """The strongest hit of each row and item, and how many runs of words count for nothing. `rows` is read twice."""
    strongest: dict[tuple[int, int], HeldItem] = {}
    templates = 0
    for compared, text_of in TEXT_OF.items():
        sought = read_items(texts(items, text_of), similarity)
        templates += sought.templates
        for hit in contaminated(texts(rows(), text_of), sought):
            found = HeldItem(
                row=int(hit.row),
                item=int(hit.item),
                kind=hit.kind,
                compared=compared,
                text=hit.text,
                similarity=hit.similarity,
            )
            pair = (found.row, found.item)
            strongest[pair] = min(strongest.get(pair, found), found, key=lambda one: STRENGTH[one.kind])
    return [strongest[pair] for pair in sorted(strongest)], templates


def texts(examples: Iterable[Example], text_of: Callable[[Example], str]) -> Iterator[Text]:
    return (Text(example.row, text_of(example)) for example in examples)
