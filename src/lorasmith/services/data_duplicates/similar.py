"""`data duplicates --semantic`: pairs that the first pass leaves and whose words are much the same in another order or form."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lorasmith.schemas.duplicates import SimilarityReport, SimilarRows
from lorasmith.services.data_duplicates.examples import row_of, whole_text
from lorasmith.services.data_duplicates.index import compared_text
from lorasmith.services.data_duplicates.search import decide
from lorasmith.services.data_duplicates.similarity import jaccard
from lorasmith.services.data_duplicates.stored import in_row_order, index_folder, index_of
from lorasmith.services.data_duplicates.texts import Key
from lorasmith.services.data_duplicates.weighted import DEFAULT_COSINE, check_cosine, similar_pairs
from lorasmith.services.data_sources import named_dataset
from lorasmith.services.workbench import Workbench

FIRST_PASS = 0.8  # similarity from which `data duplicates` shows a pair without being asked for another


def find_similar(
    workbench: Workbench, name: str, threshold: float = DEFAULT_COSINE, key: Key = "whole"
) -> SimilarityReport:
    """Pairs at or above a cosine, the nearest first, among the rows that stay at a similarity of 0.8.

    Raises `InvalidSpec` for a threshold outside 0.5 to 1, and for more than 20,000 rows that stay.
    """
    check_cosine(threshold)
    dataset = named_dataset(workbench, name)
    index = index_of(workbench, dataset, index_folder(workbench, dataset, key), key)
    kept = np.flatnonzero(decide(index, FIRST_PASS).of == np.arange(index.num_rows))
    position_of = dict(zip(index.id[kept].tolist(), kept.tolist(), strict=True))
    examples = (example for example in in_row_order(workbench, dataset) if example.row in position_of)
    rows: list[int] = []
    texts: list[str] = []

    def compared() -> Iterator[str]:
        for example in examples:
            row = row_of(example)
            rows.append(example.row)
            texts.append(whole_text(example))
            yield compared_text(row.instruction, row.answer, key)

    pairs = sorted(similar_pairs(compared(), threshold), key=lambda pair: (-pair.cosine, pair.left, pair.right))
    places = np.array([[position_of[rows[one]] for one in (pair.left, pair.right)] for pair in pairs], np.int64)
    left, right = places.reshape(-1, 2).T
    return SimilarityReport(
        dataset=dataset.name,
        dataset_sha256=dataset.sha256,
        key=key,
        threshold=threshold,
        rows=len(rows),
        left_out=index.num_rows - len(rows),
        pairs=[
            SimilarRows(
                rows=(rows[pair.left], rows[pair.right]),
                texts=(texts[pair.left], texts[pair.right]),
                cosine=pair.cosine,
                similarity=similarity,
            )
            for pair, similarity in zip(
                pairs, jaccard(index.shingles, left, index.shingles, right).tolist(), strict=True
            )
        ],
    )
