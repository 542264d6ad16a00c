"""Datasets in a workbench: whole or absent, found again, and never imported twice."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.errors import Conflict, InvalidData, NotFound
from lorasmith.files import verify_manifest
from lorasmith.schemas.data import DataImportSpec, DataPreparationSpec, Dataset, Fate
from lorasmith.services import data
from lorasmith.services.data_curation import curate
from lorasmith.services.data_import import import_dataset
from lorasmith.services.workbench import Workbench
from tests.services.import_cases import SUPPORT, dataset_folders


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

        def list(self) -> list[Dataset]:
            return []

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


def test_a_missing_file_of_a_dataset_is_named(workbench: Workbench, support: Dataset) -> None:
    path = workbench.path(support.folder) / "train.jsonl"
    path.unlink()
    with pytest.raises(NotFound) as caught:
        data.preview(workbench, "support")
    assert caught.value.message == f"the dataset 'support' is damaged: {path} is missing"


def test_a_folder_of_files_is_one_dataset_with_the_parts_that_their_names_say(
    workbench: Workbench, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n', encoding="utf-8")
    (folder / "test.csv").write_text("text\nc\na\n", encoding="utf-8")
    dataset = import_dataset(workbench, folder, DataImportSpec(name="rows"))
    assert dataset.part_sizes == {"train": 1, "val": 0, "test": 2}
    assert [(line.file, line.line, line.fate.value) for line in data.ledger_lines(workbench, "rows")] == [
        ("test.csv", 2, "kept"),
        ("test.csv", 3, "kept"),
        ("train.jsonl", 1, "exact_duplicate"),
        ("train.jsonl", 2, "kept"),
    ]


def test_the_ledger_can_be_saved(workbench: Workbench, support: Dataset, tmp_path: Path) -> None:
    data.save_ledger(data.ledger_lines(workbench, "support"), tmp_path / "out.jsonl")
    stored = workbench.path(support.folder) / "ledger.jsonl"
    assert (tmp_path / "out.jsonl").read_bytes() == stored.read_bytes()


lines = st.lists(
    st.sampled_from(
        [b'{"text": "a"}', b'{"text": "b "}', b'{"text": " b"}', b'{"text": ""}', b"{broken", b"\xff", b"", b"  "]
    )
)


@given(lines)
@settings(max_examples=60, deadline=None)
def test_the_fates_add_up_to_the_lines_in_the_raw_bytes(written: list[bytes]) -> None:
    content = b"\n".join([b'{"text": "first"}', *written])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(content)
        curated = curate(path, DataPreparationSpec(max_rejected_share=1.0))
    expected = [number for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    assert [line.line for line in curated.ledger] == expected
    assert sum(curated.fates().values()) == len(expected)
    texts = {json.loads(line)["text"].strip() for line in content.split(b"\n") if line.strip().endswith(b'"}')} - {""}
    assert len(curated.examples) == curated.fates()[Fate.KEPT] == len(texts)
