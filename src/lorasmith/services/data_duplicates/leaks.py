"""Rows of a part that hold what a model will be tested on: items of a benchmark, or of the dataset's own other parts.

Questions are compared with questions, so that a question is found whatever its answer, and whole rows with whole rows,
so that an item is found anywhere in a row. Where a row of the benchmark lists several questions, each is also compared
with every user turn of a longer conversation, so that it is found whatever stands before it. None has a system prompt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal

from lorasmith.schemas.data import Example, Part
from lorasmith.schemas.duplicates import ContaminationReport, HeldItem
from lorasmith.services.data import read_examples
from lorasmith.services.data_benchmark import Item, items_of
from lorasmith.services.data_duplicates.contamination import DEFAULT_SIMILARITY, Text, contaminated, read_items
from lorasmith.services.data_duplicates.examples import row_of, whole_text
from lorasmith.services.data_duplicates.signatures import rows_per_band
from lorasmith.services.data_sources import named_dataset
from lorasmith.services.workbench import Workbench

STRENGTH = {"exact": 0, "words": 1, "similar": 2}
Compared = Literal["question", "turn", "whole"]


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
    return search(workbench, name, part, benchmark, items_of(workbench, benchmark, column_map), similarity)


def find_leakage(workbench: Workbench, name: str, similarity: float = DEFAULT_SIMILARITY) -> list[ContaminationReport]:
    """Rows of val and of test in train."""
    rows_per_band(similarity)
    dataset = named_dataset(workbench, name)
    held_out: tuple[Part, ...] = ("val", "test")
    return [
        search(workbench, dataset.name, "train", part, map(Item, read_examples(workbench, dataset, part)), similarity)
        for part in held_out
    ]


def search(
    workbench: Workbench, name: str, part: Part, benchmark: str, wanted: Iterable[Item], similarity: float
) -> ContaminationReport:
    """Items are held in memory, rows pass by."""
    dataset = named_dataset(workbench, name)
    items = list(wanted)
    hits, templates = held_items(lambda: read_examples(workbench, dataset, part), items, similarity)
    of_item: dict[tuple[int, str | None], str] = {}
    for one in hits:
        place = one.item, one.element
        of_item[place] = min(of_item.get(place, one.kind), one.kind, key=STRENGTH.__getitem__)
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
    rows: Callable[[], Iterable[Example]], items: Sequence[Item], similarity: float
) -> tuple[list[HeldItem], int]:
    """The strongest hit of each row and item, and how many runs of words count for nothing. `rows` is read for each way
    in which they are compared."""
    strongest: dict[tuple[int, int], HeldItem] = {}
    templates = 0
    compared: Compared
    for compared, texts in TEXTS.items():
        sought = read_items(wanted_texts(items, compared), similarity)
        if not sought.ids:
            continue
        templates += sought.templates
        for hit in contaminated((Text(example.row, text) for example in rows() for text in texts(example)), sought):
            item = items[int(hit.item)]
            found = HeldItem(
                row=int(hit.row),
                item=item.example.row,
                element=item.element,
                kind=hit.kind,
                compared=compared,
                text=hit.text,
                similarity=hit.similarity,
            )
            pair = (found.row, int(hit.item))
            strongest[pair] = min(strongest.get(pair, found), found, key=lambda one: STRENGTH[one.kind])
    in_order = sorted(strongest, key=lambda pair: (pair[0], items[pair[1]].example.row, pair[1]))
    return [strongest[pair] for pair in in_order], templates


def wanted_texts(items: Sequence[Item], compared: Compared) -> Iterator[Text]:
    """Of each item what a row is compared with, under its position."""
    for position, item in enumerate(items):
        if compared == "whole":
            yield Text(position, whole_text(item.example))
        elif compared == "question" or item.element is not None:
            yield Text(position, row_of(item.example).instruction)


def user_turns(example: Example) -> list[str]:
    """Of a conversation with several; a single one is the question already."""
    turns = [message.content for message in example.messages or () if message.role == "user"]
    return turns if len(turns) > 1 else []


TEXTS: dict[Compared, Callable[[Example], list[str]]] = {
    "question": lambda example: [row_of(example).instruction],
    "turn": user_turns,
    "whole": lambda example: [whole_text(example)],
}
