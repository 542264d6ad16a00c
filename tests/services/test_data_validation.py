"""A check says what an import would say, row by row, and keeps nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import InvalidData, InvalidSpec, NotFound
from lorasmith.schemas.data import DataImportSpec, DataPreparationSpec
from lorasmith.schemas.validation import RowFinding, Validation
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_validation import validate_data
from lorasmith.services.workbench import Workbench
from tests.services.broken_files import broken_files

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = b"input,output\nWhat is open?,All of it.\nWho?,\na,b,c\nMail?,ann@mail.org\nMail?,ann@mail.org\nWhy?,no\n"


def validate(workbench: Workbench, source: object, **options: Any) -> tuple[Validation, list[RowFinding]]:
    found: list[RowFinding] = []
    return validate_data(workbench, str(source), DataPreparationSpec(**options), found.append), found


def test_each_finding_names_file_line_row_field_what_was_found_and_what_was_expected(
    workbench: Workbench, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(ROWS)
    result, found = validate(workbench, path, min_chars={"output": 3}, max_rejected_share=0.5)
    assert [(one.file, one.line, one.row, one.check, one.field, one.rejected) for one in found] == [
        ("rows.csv", 3, 2, "unusable", "output", True),
        ("rows.csv", 4, 3, "unusable", "row", True),
        ("rows.csv", 5, 4, "personal-data", "messages[1].content", False),
        ("rows.csv", 7, 6, "too-short", "output", True),
    ]
    assert (found[1].found, found[1].expected) == ("3 columns", "2 as in the header (input, output)")
    assert found[3].sentence() == "field `output`: found 2 characters, expected at least 3"
    assert result.counts == {"unusable": 2, "personal-data": 1, "too-short": 1}
    assert (result.rows, result.fates) == (6, {"kept": 2, "exact_duplicate": 1, "rejected": 3})
    assert (result.passes, result.error) == (True, None)


def test_nothing_is_kept(workbench: Workbench, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(ROWS)
    before = sorted(workbench.home.rglob("*"))
    validate(workbench, path)
    assert sorted(workbench.home.rglob("*")) == before
    assert workbench.datasets.list() == []


def test_strict_shows_all_findings_and_fails_at_the_first(workbench: Workbench, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(ROWS)
    result, found = validate(workbench, path, strict=True, max_rejected_share=1.0)
    assert [one.row for one in found] == [2, 3, 4]
    assert result.error == f"{path}:3: row 2, field `output`: found an empty text, expected the answer as text"
    assert result.rows == 6


FILES = dict(broken_files())


@pytest.mark.parametrize("options", [{}, {"strict": True}], ids=["plain", "strict"])  # test_fuzz_targets: with a share
def test_the_verdict_is_that_of_an_import(workbench: Workbench, tmp_path: Path, options: dict[str, Any]) -> None:
    for number, (name, content) in enumerate(FILES.items()):
        if "bomb" in name or len(content) > 100_000:
            continue
        path = tmp_path / name
        path.write_bytes(content)
        dataset, error = None, ""
        try:
            dataset = import_dataset(workbench, path, DataImportSpec(name=f"d{number}", **options))
        except InvalidData as caught:
            error = caught.message
        result, found = validate(workbench, path, **options)
        assert result.passes == (dataset is not None), name
        if dataset is not None:
            assert (result.fates, result.format_reason) == (dataset.fates, dataset.format_reason), name
            assert sum(one.check == "unusable" for one in found) == result.fates["rejected"], name
        else:
            assert result.error == error.partition(":\n  ")[0], name


def test_a_stored_dataset_is_checked_with_the_options_at_hand(workbench: Workbench, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"instruction,input,output\nOne,more,yes\nTwo,,no\nTwo,,no\nThree,,perhaps\n")
    dataset = import_dataset(workbench, path, DataImportSpec(name="rows", exact=True))
    result, found = validate(workbench, "rows", min_chars={"output": 3}, max_rejected_share=0.5)
    assert [(one.row, one.check) for one in found] == [(2, "too-short")]
    assert (result.rows, result.passes, result.format) == (3, True, "alpaca")
    part = found[0].file.removesuffix(".jsonl")
    assert dataset.part_sizes[part] >= found[0].line == 1
    result, _ = validate(workbench, "rows", min_chars={"output": 3})
    assert result.error is not None
    assert result.error.startswith("1 of 3 rows of")
    with pytest.raises(InvalidSpec, match="--map says how a file is read, and 'rows' is a stored dataset"):
        validate(workbench, "rows", column_map={"output": "answer"})


@pytest.mark.parametrize(
    "name", ["support.jsonl", "instructions.jsonl", "conversations.json", "texts.jsonl", "faq.csv"]
)
def test_what_was_imported_passes(workbench: Workbench, name: str) -> None:
    dataset = import_dataset(workbench, EXAMPLES / name, DataImportSpec(name="rows"))
    result, found = validate(workbench, "rows", strict=True)
    assert (result.passes, result.rows, found) == (True, dataset.num_examples, [])


def test_a_damaged_dataset_fails(workbench: Workbench) -> None:
    dataset = import_dataset(workbench, EXAMPLES / "faq.csv", DataImportSpec(name="faq", exact=True))
    train = workbench.path(dataset.folder) / "train.jsonl"
    train.write_text(train.read_text(encoding="utf-8").replace("a", "b", 1), encoding="utf-8")
    result, _ = validate(workbench, "faq")
    assert not result.passes
    assert result.error is not None
    assert "is damaged: train.jsonl does not match its checksum" in result.error


def test_a_built_in_dataset_is_checked_and_not_imported(workbench: Workbench) -> None:
    result, _ = validate(workbench, "interactions")
    assert result.passes
    assert workbench.datasets.list() == []


def test_a_source_that_is_not_there_is_not_found(workbench: Workbench, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file"):
        validate(workbench, tmp_path / "none.jsonl")
    import_dataset(workbench, EXAMPLES / "faq.csv", DataImportSpec(name="questions"))
    with pytest.raises(NotFound, match=r"no dataset and no file 'question'; did you mean 'questions'\?"):
        validate(workbench, "question")


@pytest.mark.parametrize("option", ["min_chars", "max_chars"])
def test_a_limit_on_a_field_that_is_not_there_is_refused(workbench: Workbench, tmp_path: Path, option: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(ROWS)
    spelled = "--" + option.replace("_", "-")
    with pytest.raises(InvalidSpec) as caught:
        import_dataset(workbench, path, DataImportSpec.model_validate({"name": "rows", option: {"outptu": 3}}))
    expected = f"{spelled} names the field 'outptu', which {path} does not have; did you mean 'output'?"
    assert (caught.value.message, caught.value.hint) == (expected, "its fields: input, output")
    with pytest.raises(InvalidSpec, match=spelled):
        validate(workbench, path, **{option: {"outptu": 3}})
    import_dataset(workbench, path, DataImportSpec(name="rows", max_chars={"system": 9}, max_rejected_share=0.5))


def test_a_folder_of_several_formats_is_refused_with_the_files_of_each(workbench: Workbench, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in "abcd":
        (folder / f"{name}.csv").write_text("text,label\nfine,good\n", encoding="utf-8")
    (folder / "e.jsonl").write_text('{"input": "a", "output": "b"}\n', encoding="utf-8")
    with pytest.raises(InvalidData) as caught:
        import_dataset(workbench, folder, DataImportSpec(name="mixed"))
    assert caught.value.message == (
        f"{folder} holds files of different formats (classification: a.csv, b.csv, c.csv and 1 more; chat: e.jsonl), "
        "expected one format in a folder"
    )
    result, _ = validate(workbench, folder)
    assert result.error == caught.value.message
    assert [path.name for path in (workbench.home / "datasets").iterdir()] == []


def test_a_file_of_a_folder_that_is_no_data_is_named(workbench: Workbench, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    (folder / "info.json").write_text('[{"licence": "MIT"}]', encoding="utf-8")
    with pytest.raises(InvalidData, match=r"rows/info.json has the columns licence, expected one of"):
        import_dataset(workbench, folder, DataImportSpec(name="rows"))


def test_files_of_one_format_with_other_columns_are_one_dataset(workbench: Workbench, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"input": "a", "output": "b"}\n{broken\n', encoding="utf-8")
    (folder / "b.csv").write_text("question,answer\nc,d\n", encoding="utf-8")
    (folder / "c.jsonl").write_text("{broken\n", encoding="utf-8")
    dataset = import_dataset(workbench, folder, DataImportSpec(name="rows", max_rejected_share=0.5))
    assert dataset.fates == {"kept": 2, "exact_duplicate": 0, "rejected": 2}
