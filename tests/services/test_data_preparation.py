"""`data prepare`: the folder of the CPU training guide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorasmith.errors import Conflict, InvalidData, InvalidSpec, NotFound
from lorasmith.schemas.data import DataImportSpec, DataPreparationSpec
from lorasmith.services.data import list_datasets
from lorasmith.services.data_conversion import DEFAULT_SYSTEM_PROMPT, SYSTEM_PROMPTS
from lorasmith.services.data_preparation import prepare_and_import, prepare_domains, prepare_folder
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


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    """`financial.jsonl` with 30 rows and near copies of ten, `legal/` with two files of ten rows."""
    folder = tmp_path / "domains"
    (folder / "legal").mkdir(parents=True)
    story = " ".join(f"word{n}" for n in range(60))
    rows = [{"input": f"Question {n}?", "output": f"{story} {n}" if n < 11 else f"answer {n}"} for n in range(30)]
    write_lines(folder / "financial.jsonl", rows)
    for file in ("a", "b"):
        rows = [{"instruction": f"Read {file}{n}", "input": "", "output": f"clause {n} of {file}"} for n in range(10)]
        write_lines(folder / "legal" / f"{file}.jsonl", rows)
    return folder


def write_lines(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_several_domains_are_prepared_at_once_each_in_its_folder(domains: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    spec = DataPreparationSpec(exact=True, near_duplicates=0.8, max_rows=24)
    metadata = prepare_domains(domains, output, {"financial": spec, "legal": spec})
    financial, legal = metadata["financial"], metadata["legal"]
    assert financial["source_rows"] == 24
    assert financial["fates"]["near_duplicate"] > 0
    assert financial["format_reason"].endswith("; only its first 24 rows were read, as asked")
    assert (legal["total_examples"], legal["format"], legal["near_duplicates"]) == (20, "alpaca", 0.8)
    assert "only its first" not in legal["format_reason"]
    for domain, one in metadata.items():
        stored = json.loads((output / domain / "metadata.json").read_text(encoding="utf-8"))
        assert stored["total_examples"] == one["total_examples"]
        lines = [(output / domain / f"{part}.jsonl").read_text(encoding="utf-8") for part in ("train", "val", "test")]
        assert sum(text.count("\n") for text in lines) == one["total_examples"]
    with pytest.raises(Conflict, match="is not empty"):
        prepare_domains(domains, output, {"financial": spec, "legal": spec})
    prepare_domains(domains, output, {"legal": spec, "financial": spec}, force=True)
    (output / "legal" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(Conflict, match=r"holds 'legal/notes\.txt', which `data prepare` did not write"):
        prepare_domains(domains, output, {"legal": spec, "financial": spec}, force=True)


def test_domains_become_datasets_of_their_names(domains: Path, tmp_path: Path, workbench: Workbench) -> None:
    specs = {name: DataImportSpec(name=f"my-{name}", exact=True, max_rows=15) for name in ("financial", "legal")}
    metadata = prepare_domains(domains, tmp_path / "out", specs, workbench=workbench)
    assert [metadata[name]["dataset"]["name"] for name in specs] == ["my-financial", "my-legal"]
    stored = workbench.datasets.require("my-legal")
    assert (stored.num_examples, sum(stored.fates.values())) == (15, 15)
    for part, size in stored.part_sizes.items():
        lines = (tmp_path / "out" / "legal" / f"{part}.jsonl").read_text(encoding="utf-8")
        assert lines.count("\n") == size


def test_a_bad_domain_stops_all_of_them_and_nothing_is_written(domains: Path, tmp_path: Path) -> None:
    spec = DataPreparationSpec()
    with pytest.raises(NotFound) as caught:
        prepare_domains(domains, tmp_path / "out", {"financial": spec, "lega": spec})
    assert caught.value.message == f"{domains} holds no file or folder for the domain 'lega'; did you mean 'legal'?"
    assert caught.value.hint == "it holds: financial, legal"
    (domains / "legal" / "a.jsonl").write_text('{"instruction": "x"}\n', encoding="utf-8")
    with pytest.raises(InvalidData):
        prepare_domains(domains, tmp_path / "out", {"financial": spec, "legal": spec})
    assert not (tmp_path / "out").exists()
    (domains / "financial.csv").write_text("input,output\na,b\n", encoding="utf-8")
    with pytest.raises(InvalidData) as twice:
        prepare_domains(domains, tmp_path / "out", {"financial": spec})
    assert twice.value.message == (
        f"{domains} holds more than one source for the domain 'financial': financial.csv, financial.jsonl"
    )
    with pytest.raises(InvalidSpec, match="--domains needs a folder with a file or folder for each, got"):
        prepare_domains(domains / "financial.csv", tmp_path / "out", {"financial": spec})
