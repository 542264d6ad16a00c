"""Datasets in a workbench: whole or absent, found again, and never imported twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasmith.errors import Conflict, InvalidData, NotFound
from lorasmith.files import verify_manifest
from lorasmith.schemas.data import DataImportSpec, Dataset, Fate
from lorasmith.services import data
from lorasmith.services.data_import import import_dataset
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings

SUPPORT = Path(__file__).parents[2] / "examples" / "support.jsonl"


@pytest.fixture
def workbench(tmp_path: Path) -> Workbench:
    return Workbench.open(Settings(home=tmp_path / "home"))


@pytest.fixture
def support(workbench: Workbench) -> Dataset:
    return import_dataset(workbench, SUPPORT, DataImportSpec(name="support", exact=True))


def dataset_folders(workbench: Workbench) -> list[str]:
    folder = workbench.home / "datasets"
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_an_import_writes_parts_ledger_and_dataset_and_then_the_row(workbench: Workbench, support: Dataset) -> None:
    folder = workbench.path(support.folder)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["dataset.json", "ledger.jsonl", "manifest.json", "test.jsonl", "train.jsonl", "val.jsonl"]
    verify_manifest(folder)
    assert support.part_sizes == {"train": 9, "val": 1, "test": 2}
    for part, size in support.part_sizes.items():
        assert len(list(data.read_examples(workbench, support, part))) == size
    assert Dataset.model_validate_json((folder / "dataset.json").read_bytes()) == support
    assert data.get_dataset(workbench, "support") == data.get_dataset(workbench, support.id) == support
    assert data.list_datasets(workbench) == [support]


def test_stored_rows_leave_out_what_is_empty(workbench: Workbench, support: Dataset) -> None:
    first = json.loads((workbench.path(support.folder) / "train.jsonl").read_text(encoding="utf-8").split("\n")[0])
    assert sorted(first) == ["group", "id", "messages", "row"]


def test_the_same_import_again_gives_the_dataset_that_is_there(workbench: Workbench, support: Dataset) -> None:
    again = import_dataset(workbench, SUPPORT, DataImportSpec(name="support", exact=True))
    assert again == support
    assert dataset_folders(workbench) == [support.id]


def test_a_name_keeps_its_content(workbench: Workbench, support: Dataset, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(Conflict) as caught:
        import_dataset(workbench, other, DataImportSpec(name="support", exact=True))
    assert caught.value.message == (
        f"there is already a dataset 'support', and it was made from other content than {other} has"
    )
    assert caught.value.hint == "choose another --name, or remove it first: lorasmith data rm support --yes"
    with pytest.raises(Conflict, match=r"'support', and it was made from .* with other options"):
        import_dataset(workbench, SUPPORT, DataImportSpec(name="support"))
    assert dataset_folders(workbench) == [support.id]


def test_equal_content_has_an_equal_digest_and_another_split_another(workbench: Workbench, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    rows = [json.loads(line) for line in SUPPORT.read_text(encoding="utf-8").splitlines()]
    copy.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    first = import_dataset(workbench, SUPPORT, DataImportSpec(name="lines"))
    same = import_dataset(workbench, copy, DataImportSpec(name="array"))
    other = import_dataset(workbench, SUPPORT, DataImportSpec(name="salted", salt="another"))
    assert first.sha256 == same.sha256 != other.sha256
    assert first.source_sha256 == other.source_sha256 != same.source_sha256


def test_a_refused_file_leaves_nothing_behind(workbench: Workbench, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input": "a", "output": "b"}\n{"input": "c"}\n', encoding="utf-8")
    with pytest.raises(InvalidData):
        import_dataset(workbench, bad, DataImportSpec(name="bad"))
    assert data.list_datasets(workbench) == []
    assert dataset_folders(workbench) == []


def test_a_row_that_cannot_be_stored_leaves_no_folder(workbench: Workbench, support: Dataset) -> None:
    class NoRows:
        """A table in which another process takes the name between the look and the insert."""

        def get(self, name: str) -> None:
            return None

        def add(self, dataset: Dataset) -> Dataset:
            return workbench.datasets.add(dataset)

    racing = Workbench(**{**vars(workbench), "datasets": NoRows()})
    with pytest.raises(Conflict, match="there is already a dataset named 'support'"):
        import_dataset(racing, SUPPORT, DataImportSpec(name="support"))
    assert dataset_folders(workbench) == [support.id]


def test_an_unknown_name_suggests_a_near_one(workbench: Workbench, support: Dataset) -> None:
    with pytest.raises(NotFound, match=r"no dataset 'suport'; did you mean 'support'\?"):
        data.get_dataset(workbench, "suport")


def test_preview_gives_the_first_examples_of_a_part(workbench: Workbench, support: Dataset) -> None:
    examples = data.preview(workbench, "support", 2)
    assert [example.row for example in examples] == sorted(example.row for example in examples)
    assert len(examples) == 2
    assert len(data.preview(workbench, "support", 50, "test")) == 2


def test_the_ledger_can_be_asked_for_one_fate(workbench: Workbench, tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('{"text": "a"}\n{"text": "a "}\n{"text": ""}\n{"text": "b"}\n', encoding="utf-8")
    import_dataset(workbench, source, DataImportSpec(name="rows", max_rejected_share=0.3))
    assert [line.row for line in data.ledger_lines(workbench, "rows")] == [1, 2, 3, 4]
    (duplicate,) = data.ledger_lines(workbench, "rows", Fate.EXACT_DUPLICATE)
    assert (duplicate.row, duplicate.duplicate_of_row, duplicate.file) == (2, 1, "rows.jsonl")


def test_removing_takes_row_and_folder(workbench: Workbench, support: Dataset) -> None:
    data.remove_dataset(workbench, "support")
    assert data.list_datasets(workbench) == []
    assert dataset_folders(workbench) == []


def test_a_missing_file_of_a_dataset_is_named(workbench: Workbench, support: Dataset) -> None:
    path = workbench.path(support.folder) / "train.jsonl"
    path.unlink()
    with pytest.raises(NotFound) as caught:
        data.preview(workbench, "support")
    assert caught.value.message == f"the dataset 'support' is damaged: {path} is missing"
