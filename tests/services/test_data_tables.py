"""Parquet files and datasets of the library `datasets`, which need the extra `data`."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import InvalidData, MissingExtra, NotFound
from lorasmith.services.data_reading import Source, read_rows
from lorasmith.services.data_rows import RawRow

ROWS = [{"text": "good", "label": 1}, {"text": "bad", "label": 0}, {"text": "good again", "label": 1}]
NAMED = [{**row, "label": ["negative", "positive"][row["label"]]} for row in ROWS]


@pytest.fixture
def saved() -> Any:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    import pyarrow
    from datasets.table import InMemoryTable

    table = InMemoryTable(pyarrow.Table.from_pylist(ROWS).cast(features.arrow_schema))
    # With a fingerprint of its own: `from_list` pickles the table for one, which pyarrow 26 does not allow.
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint="0" * 16)


def values_of(path: Path) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(path)]


def test_a_parquet_file_has_its_rows_and_the_names_of_its_labels(saved: Any, tmp_path: Path) -> None:
    saved.to_parquet(tmp_path / "a.parquet")
    assert values_of(tmp_path / "a.parquet") == NAMED


def test_a_saved_dataset_has_its_rows(saved: Any, tmp_path: Path) -> None:
    saved.save_to_disk(tmp_path / "one")
    assert values_of(tmp_path / "one") == NAMED
    assert Source.open(tmp_path / "one").digest() == Source.open(tmp_path / "one").digest()


def test_the_splits_of_a_saved_dataset_are_the_parts(saved: Any, tmp_path: Path) -> None:
    import datasets

    splits = datasets.DatasetDict({"train": saved.select([0, 1]), "validation": saved.select([2])})
    splits.save_to_disk(tmp_path / "two")
    rows = list(Source.open(tmp_path / "two").rows())
    assert [(row.number, row.part, row.file) for row in rows if isinstance(row, RawRow)] == [
        (1, "train", "train"),
        (2, "train", "train"),
        (3, "val", "validation"),
    ]


def test_a_folder_in_the_layout_of_the_hub_is_read_without_the_hub(saved: Any, tmp_path: Path) -> None:
    (tmp_path / "hub" / "data").mkdir(parents=True)
    saved.to_parquet(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet")
    assert [row.part for row in read_rows(tmp_path / "hub")] == ["test", "test", "test"]


def test_a_damaged_saved_dataset_is_refused(saved: Any, tmp_path: Path) -> None:
    saved.save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(InvalidData, match="is not a whole saved dataset"):
        values_of(tmp_path / "one")


@pytest.mark.slow
def test_a_hub_id_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(NotFound, match="no file nobody/nothing, and the dataset nobody/nothing cannot be had from the"):
        list(read_rows(Path("nobody/nothing")))


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_without_the_extra_the_error_says_how_to_get_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_pyarrow(module: str, *arguments: Any, **named: Any) -> Any:
        if module.startswith("pyarrow"):
            raise ImportError(module)
        return real(module, *arguments, **named)

    (tmp_path / name).write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(MissingExtra) as caught:
        list(read_rows(tmp_path / name))
    assert caught.value.hint == "pip install 'lorasmith[data]'"


def test_a_file_packed_by_zstd_has_the_rows_of_the_plain_one(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    with pyarrow.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as file:
        file.write(b'{"text": "one"}\n{"text": "two"}\n')
    assert values_of(tmp_path / "a.jsonl.zst") == [{"text": "one"}, {"text": "two"}]
    packed = (tmp_path / "a.jsonl.zst").read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(packed[:-3])
    with pytest.raises(InvalidData, match="is not a whole zstd file: Truncated compressed stream"):
        values_of(tmp_path / "a.jsonl.zst")
