"""`data prepare`: the folder of the CPU training guide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasmith.errors import Conflict, InvalidData
from lorasmith.schemas.data import DataImportSpec, DataPreparationSpec
from lorasmith.services.data import list_datasets
from lorasmith.services.data_conversion import DEFAULT_SYSTEM_PROMPT, SYSTEM_PROMPTS
from lorasmith.services.data_preparation import prepare_and_import, prepare_folder
from lorasmith.services.workbench import Workbench
from lorasmith.settings import Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
EXACT = DataPreparationSpec(exact=True)


@pytest.fixture
def collected(tmp_path: Path) -> Path:
    """298 distinct interactions, as many as the guide has."""
    path = tmp_path / "interactions.jsonl"
    rows = (
        {"task": {"description": f"Task {n}"}, "agent": {"role": "coder"}, "execution": {"output": f"Answer {n}"}}
        for n in range(298)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_298_interactions_become_238_29_and_31_conversations(collected: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    metadata = prepare_folder(collected, output, EXACT)
    parts = {
        part: (output / f"{part}.jsonl").read_text(encoding="utf-8").splitlines() for part in ("train", "val", "test")
    }
    assert {part: len(lines) for part, lines in parts.items()} == {"train": 238, "val": 29, "test": 31}
    assert json.loads((output / "metadata.json").read_text(encoding="utf-8")) == metadata
    counts = [metadata[f"{part}_examples"] for part in ("total", "train", "val", "test")]
    assert counts == [298, 238, 29, 31]
    (number,) = {json.loads(parts["train"][0])["messages"][1]["content"].removeprefix("Task ")}
    assert json.loads(parts["train"][0]) == {
        "messages": [
            {"role": "system", "content": SYSTEM_PROMPTS["coder"]},
            {"role": "user", "content": f"Task {number}"},
            {"role": "assistant", "content": f"Answer {number}"},
        ]
    }


def test_the_metadata_tells_source_split_and_system_prompts(tmp_path: Path) -> None:
    metadata = prepare_folder(EXAMPLES / "interactions.jsonl", tmp_path / "data", EXACT)
    assert metadata["format"] == "interactions"
    assert metadata["split"] == {"train": 0.8, "val": 0.1, "test": 0.1}
    assert metadata["fates"] == {"kept": 8, "exact_duplicate": 0, "rejected": 0}
    assert metadata["salt"] == "lorasmith"
    assert len(metadata["source_sha256"]) == 64
    assert list(metadata["system_prompts"]) == [
        "coder",
        "reviewer",
        "tester",
        "debugger",
        "architect",
        "writer",
        "default",
    ]
    assert metadata["system_prompts"]["default"] == DEFAULT_SYSTEM_PROMPT


def test_a_full_folder_is_kept_unless_forced(collected: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    prepare_folder(collected, output, EXACT)
    before = (output / "metadata.json").read_bytes()
    with pytest.raises(Conflict) as caught:
        prepare_folder(collected, output, EXACT)
    assert caught.value.message == f"{output} is not empty"
    assert caught.value.hint == "choose another --output, or replace its files with --force"
    assert (output / "metadata.json").read_bytes() == before
    prepare_folder(collected, output, DataPreparationSpec(), force=True)
    assert (output / "metadata.json").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_folder_with_other_files_is_never_replaced(collected: Path, tmp_path: Path) -> None:
    with pytest.raises(Conflict, match=r"holds 'interactions.jsonl', which `data prepare` did not write") as caught:
        prepare_folder(collected, tmp_path, EXACT, force=True)
    assert caught.value.hint == "choose another --output; a folder with other files is never replaced"
    with pytest.raises(Conflict, match=r"interactions\.jsonl is a file, expected a folder"):
        prepare_folder(collected, collected, EXACT, force=True)


def test_plain_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match=r"holds plain texts .* expected conversations or collected interactions"):
        prepare_folder(EXAMPLES / "texts.jsonl", tmp_path / "data", EXACT)
    assert not (tmp_path / "data").exists()


def test_a_name_also_imports_the_same_examples(collected: Path, tmp_path: Path) -> None:
    workbench = Workbench.open(Settings(home=tmp_path / "home"))
    spec = DataImportSpec(name="agents", exact=True)
    metadata = prepare_and_import(workbench, collected, tmp_path / "data", spec)
    (dataset,) = list_datasets(workbench)
    assert metadata["dataset"] == {"id": dataset.id, "name": "agents"}
    assert dataset.part_sizes == {"train": 238, "val": 29, "test": 31}


def test_a_refused_output_imports_nothing(collected: Path, tmp_path: Path) -> None:
    workbench = Workbench.open(Settings(home=tmp_path / "home"))
    with pytest.raises(Conflict):
        prepare_and_import(workbench, collected, tmp_path, DataImportSpec(name="agents"))
    assert list_datasets(workbench) == []
