import numpy as np
import pytest

from lorasmith.errors import InvalidSpec
from lorasmith.services.data_duplicates.texts import folded
from lorasmith.services.data_duplicates.weighted import similar_pairs


def closed_form_cosines(texts: list[str]) -> np.ndarray:
    """TF-IDF by its definition, dense, in float64."""
    counted: list[dict[tuple[str, ...], int]] = []
    for text in texts:
        counts: dict[tuple[str, ...], int] = {}
        for size in (3, 4, 5):
            padded = [""] * (size - 1) + list(folded(text)) + [""] * (size - 1)
            for place in range(len(padded) - size + 1 if folded(text) else 0):
                gram = tuple(padded[place : place + size])
                counts[gram] = counts.get(gram, 0) + 1
        counted.append(counts)
    terms = sorted({term for counts in counted for term in counts})
    matrix = np.array([[counts.get(term, 0) for term in terms] for counts in counted], float)
    weights = np.where(matrix > 0, 1 + np.log(np.maximum(matrix, 1)), 0)
    weights *= np.log((1 + len(texts)) / (1 + (matrix > 0).sum(axis=0))) + 1
    norms = np.linalg.norm(weights, axis=1, keepdims=True)
    weights /= np.where(norms > 0, norms, 1)
    return weights @ weights.T


def test_pairs_are_those_of_the_closed_form() -> None:
    texts = [
        "How do I reverse a list in Python?",
        "In Python, how do I reverse a list?",
        "How can a list be reversed in Python",
        "What is the capital of France?",
        "France: what is its capital?",
        "",
        "How do I reverse a list in Python?",
    ]
    expected = closed_form_cosines(texts)
    found = {(pair.left, pair.right): pair.cosine for pair in similar_pairs(texts, 0.5)}
    upper = zip(*np.nonzero(np.triu(expected >= 0.5, 1)), strict=True)
    assert set(found) == {(int(left), int(right)) for left, right in upper}
    for (left, right), cosine in found.items():
        assert cosine == pytest.approx(expected[left, right], abs=1e-12)  # float64, some hundred terms
    assert (0, 1) in found
    assert found[0, 6] == pytest.approx(1.0)


def test_limits_are_said() -> None:
    with pytest.raises(InvalidSpec, match="between 0.5 and 1, got 0.1"):
        list(similar_pairs([], 0.1))
    with pytest.raises(InvalidSpec, match="too long above 20000 rows"):
        list(similar_pairs(["a"] * 20_001))
    assert list(similar_pairs([])) == []
