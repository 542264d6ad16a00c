"""Statistics of a dataset: percentiles that are numpy's, and what each part holds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.errors import Conflict, Interrupted, InvalidSpec
from lorasmith.files import read_json
from lorasmith.schemas.data import DataImportSpec, Fate
from lorasmith.schemas.jobs import Event
from lorasmith.schemas.statistics import MOST_BINS, Distribution, StatisticsSpec
from lorasmith.services.data import tokens_folder
from lorasmith.services.data_describe import describe_dataset
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_removal import remove_dataset
from lorasmith.services.data_statistics_page import page, write_page
from lorasmith.services.workbench import Workbench


def unwatched(event: Event) -> None:
    pass


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=300))
def test_percentiles_are_the_nearest_ranks_of_numpy(values: list[int]) -> None:
    found = Distribution.of(Counter(values))
    for name, percent in (("p50", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert getattr(found, name) == np.percentile(values, percent, method="inverted_cdf")
    assert (found.min, found.max, found.total, found.count) == (min(values), max(values), sum(values), len(values))
    assert found.mean == pytest.approx(np.mean(values))


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=300))
def test_every_value_is_in_one_bin(values: list[int]) -> None:
    bins = Distribution.of(Counter(values)).bins
    assert len(bins) <= MOST_BINS + 2  # widths and borders are round
    assert sum(one.count for one in bins) == len(values)
    for one in bins:
        inside = [value for value in values if value >= one.start and (one.end is None or value < one.end)]
        assert one.count == len(inside)


@pytest.fixture
def reviews(workbench: Workbench, tmp_path: Path) -> str:
    path = tmp_path / "reviews.csv"
    rows = [
        ("good and cheap", "positive"),
        ("bad <b>", "negative"),
        ("never again", "negative"),
        ("bad <b>", "negative"),
    ]
    path.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return import_dataset(workbench, path, DataImportSpec(name="reviews", split=(1.0, 0.0, 0.0))).name


def test_parts_are_described_without_a_model(workbench: Workbench, reviews: str) -> None:
    found = describe_dataset(workbench, StatisticsSpec(data=reviews), unwatched)
    train = found.parts["train"]
    assert (train.examples, train.roles) == (3, {"user": 3, "assistant": 3})
    assert train.labels == {"negative": 2, "positive": 1}
    assert found.fates[Fate.EXACT_DUPLICATE] == 1
    assert train.turns.p50 == 2
    assert train.answer_characters.max == 8
    assert train.languages == {"unknown": 3}  # labels are too short to tell
    assert found.tokens is None
    assert not workbench.path("tokens").exists()


def test_tokens_stay_for_training_and_go_with_the_dataset(workbench: Workbench, reviews: str) -> None:
    found = describe_dataset(workbench, StatisticsSpec(data=reviews, model="starter"), unwatched)
    assert found.tokens is not None
    folder = tokens_folder(workbench, workbench.datasets.require(reviews).id)
    (store,) = [path for path in folder.iterdir() if path.is_dir()]
    assert read_json(store / "origin.json")["stop_ids"]
    assert found.tokens.store_bytes == sum(path.stat().st_size for path in store.iterdir())
    assert list(workbench.path("previews").iterdir()) == []
    remove_dataset(workbench, reviews)
    assert not folder.exists()


def test_ctrl_c_leaves_no_job_folder(workbench: Workbench, reviews: str) -> None:
    def presses_ctrl_c(event: Event) -> None:
        if event.type == "started":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        describe_dataset(workbench, StatisticsSpec(data=reviews, model="starter"), presses_ctrl_c)
    assert list(workbench.path("previews").iterdir()) == []


def test_the_page_escapes_the_data_and_replaces_nothing_unasked(workbench: Workbench, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,<script>\nb,<script>\n")
    name = import_dataset(workbench, rows, DataImportSpec(name="rows", split=(1.0, 0.0, 0.0))).name
    found = describe_dataset(workbench, StatisticsSpec(data=name), unwatched)
    text = page(found)
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    write_page(found, tmp_path / "page.html")
    with pytest.raises(Conflict, match="exists already"):
        write_page(found, tmp_path / "page.html")
    with pytest.raises(InvalidSpec, match="the page is HTML, and .*page.pdf has another ending"):
        write_page(found, tmp_path / "page.pdf")
