"""What searches over stored datasets report: duplicates within one, and rows that a benchmark or another part holds."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class DuplicateRow(BaseModel):
    """A row for which another one stands; `via` is a row of its cluster that is nearer, where `of` is not near enough."""

    row: int
    kind: Literal["exact", "near"]
    of: int
    similarity: float
    via: int | None = None


class DuplicateReport(BaseModel):
    """Rows are input rows of the dataset's source. `hashed` is false where the index was there already."""

    dataset: str
    dataset_sha256: str
    key: Literal["whole", "instruction", "answer"]
    threshold: float
    hashed: bool
    rows: int
    kept: int
    exact: int
    near: int
    near_clusters: int = Field(description="Clusters that hold near duplicates.")
    recall_at_threshold: float | None = Field(description="Probability of finding a pair exactly at the threshold.")
    uncompared_pairs: int
    duplicates: list[DuplicateRow]
    groups: list[list[int]] = Field(description="Rows that stay, with one instruction and different answers.")


class SimilarRows(BaseModel):
    """Two rows, the earlier first, with all that they say. `similarity` is that of the first pass: shared shingles."""

    rows: tuple[int, int]
    texts: tuple[str, str]
    cosine: float
    similarity: float


class SimilarityReport(BaseModel):
    """Pairs for a person to decide on, the nearest first; nothing is taken out for them."""

    dataset: str
    dataset_sha256: str
    key: Literal["whole", "instruction", "answer"]
    threshold: float
    rows: int = Field(description="Rows that were compared, all with all.")
    left_out: int = Field(description="Rows for which another one stands after the first pass at 0.8.")
    pairs: list[SimilarRows]


class HeldItem(BaseModel):
    """One row that holds one item. `element` says which of the questions that the item's row lists, such as `turns.1`;
    `text` is what matches, folded; `similarity` stands at `similar` alone."""

    row: int
    item: int
    element: str | None = None
    kind: Literal["exact", "words", "similar"]
    compared: Literal["question", "turn", "whole"]
    text: str
    similarity: float | None = None


class ContaminationReport(BaseModel):
    """`held` of `items` items are in the rows, by the strongest hit of each; items are numbered by their input row, which
    is as many items as it lists questions."""

    dataset: str
    part: str
    benchmark: str
    rows: int
    items: int
    held: int
    exact: int
    words: int
    similar: int
    templates: int = Field(description="Runs of words in more than 10 items, which count for nothing.")
    hits: list[HeldItem]
