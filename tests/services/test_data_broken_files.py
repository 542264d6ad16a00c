"""No file, however broken, crashes or hangs an import, or leaves half a dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.errors import LorasmithError
from lorasmith.schemas.data import DataImportSpec, Fate
from lorasmith.services.data import ledger_lines, list_datasets
from lorasmith.services.data_import import import_dataset
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings
from tests.services.broken_files import CHAT, GOOD, broken_files

FILES = dict(broken_files())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    return Workbench.open(Settings(home=tmp_path_factory.mktemp("home")))


def test_there_are_many_of_them() -> None:
    assert len(FILES) >= 150


@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_gives_one_clear_error_or_a_whole_dataset(shared: Workbench, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(FILES[name])
    before = dataset_folders(shared)
    spec = DataImportSpec(name=f"d{len(list_datasets(shared))}", max_rejected_share=0.5)
    try:
        dataset = import_dataset(shared, path, spec)
    except LorasmithError as caught:
        error = caught
    else:
        assert sum(dataset.fates.values()) >= dataset.num_examples > 0
        assert dataset_folders(shared) == before | {dataset.id}
        return
    assert (
        str(tmp_path) in error.message or "in their field `split`" in error.message or "extra `data`" in error.message
    )
    assert error.hint
    assert dataset_folders(shared) == before


def dataset_folders(workbench: Workbench) -> set[str]:
    return {folder.name for folder in (workbench.home / "datasets").glob("*")}


def test_names_with_bidi_marks_and_line_breaks_are_files_like_others(shared: Workbench, tmp_path: Path) -> None:
    path = tmp_path / "\u202egpj.\n\u2066.jsonl"
    path.write_bytes(GOOD)
    assert import_dataset(shared, path, DataImportSpec(name="bidi")).num_examples == 1


def test_a_key_with_half_a_surrogate_pair_inside_a_text_is_told_in_words_that_can_be_stored(
    shared: Workbench, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"  # found by fuzzing: the reader checks keys, JSON inside a text has keys of its own
    path.write_bytes(CHAT + CHAT.replace(b'"messages"', rb'"tools": "[{\"na\\ud800me\": 1}]", "messages"'))
    dataset = import_dataset(shared, path, DataImportSpec(name="surrogate", max_rejected_share=0.5))
    (rejected,) = ledger_lines(shared, dataset.name, Fate.REJECTED)
    assert rejected.reason is not None
    assert rejected.reason.startswith(r"field `tools[0]`: found an object with na\ud800me, expected an object")
