"""Duplicates of a stored dataset. Its index lies in the dataset's folder, under the digest of the dataset's content."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

from lorasmith.schemas.data import PARTS, Dataset, Example
from lorasmith.schemas.duplicates import DuplicateReport, DuplicateRow
from lorasmith.services.data import read_examples
from lorasmith.services.data_duplicates.examples import row_of
from lorasmith.services.data_duplicates.index import Index, open_index, write_index
from lorasmith.services.data_duplicates.search import decide
from lorasmith.services.data_duplicates.signatures import rows_per_band
from lorasmith.services.data_duplicates.texts import Key
from lorasmith.services.data_parts import INDEXES, SET_ASIDE, index_of_rows
from lorasmith.services.data_sources import named_dataset
from lorasmith.services.workbench import Workbench


def find_duplicates(workbench: Workbench, name: str, threshold: float = 0.8, key: Key = "whole") -> DuplicateReport:
    """Rows of all parts against each other. The first call hashes the rows, a later one at any threshold does not.

    Raises `InvalidSpec` for a threshold outside 0.4 to 1 or an unknown key, before anything is hashed.
    """
    rows_per_band(threshold)
    dataset = named_dataset(workbench, name)
    folder = index_folder(workbench, dataset, key)
    hashed = not folder.exists()
    decision = decide(index_of(workbench, dataset, folder, key), threshold)
    summary = decision.summary()
    duplicates: list[DuplicateRow] = []
    groups: dict[int, list[int]] = {}
    for finding in decision.findings():
        if finding.group is not None:
            groups.setdefault(finding.group, []).append(finding.id)
        if finding.kind != "kept":
            assert finding.of is not None
            assert finding.similarity is not None
            duplicates.append(
                DuplicateRow(
                    row=finding.id, kind=finding.kind, of=finding.of, similarity=finding.similarity, via=finding.via
                )
            )
    return DuplicateReport(
        dataset=dataset.name,
        dataset_sha256=dataset.sha256,
        key=key,
        threshold=threshold,
        hashed=hashed,
        rows=summary.rows,
        kept=summary.kept,
        exact=summary.exact,
        near=summary.near,
        near_clusters=summary.near_clusters,
        recall_at_threshold=summary.recall_at_threshold,
        uncompared_pairs=summary.uncompared_pairs,
        duplicates=duplicates,
        groups=list(groups.values()),
    )


def index_folder(workbench: Workbench, dataset: Dataset, key: Key) -> Path:
    """That of all rows that were read, where none of them was taken out since."""
    folder = workbench.path(dataset.folder)
    if key == "whole" and dataset.read_in and not (folder / SET_ASIDE).exists():
        return stored_index_of_rows(workbench, dataset)
    return folder / INDEXES / f"{key}-{dataset.sha256}"


def stored_index_of_rows(workbench: Workbench, dataset: Dataset) -> Path:
    """Versions that were decided from the same rows share it, as long as the version that read them is there."""
    read_in = workbench.path(f"datasets/{dataset.read_in}")
    return index_of_rows(read_in if read_in.is_dir() else workbench.path(dataset.folder))


def index_of(workbench: Workbench, dataset: Dataset, folder: Path, key: Key) -> Index:
    if folder.exists():
        return open_index(folder)
    return write_index(map(row_of, in_row_order(workbench, dataset)), folder, key=key)


def in_row_order(workbench: Workbench, dataset: Dataset) -> Iterator[Example]:
    """Examples of all parts: of two equal rows the earlier one stays, whatever parts they are in."""
    parts = [read_examples(workbench, dataset, part) for part in PARTS]
    return heapq.merge(*parts, key=lambda example: example.row)
