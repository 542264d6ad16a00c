"""Deciding again gives what an import with the new options gives, and undoing gives what was there before."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.errors import Conflict, InvalidData, InvalidSpec, NotFound
from lorasmith.files import new_id
from lorasmith.schemas.data import DataImportSpec, Dataset, Fate
from lorasmith.services import data
from lorasmith.services.data_curation import Curation
from lorasmith.services.data_decision import decide_rows
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_progress import silent
from lorasmith.services.data_reading import Source
from lorasmith.services.data_redeciding import dedup, rows_of_version, split
from lorasmith.services.data_versions import versions_of
from lorasmith.services.workbench import Workbench

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = ("train.jsonl", "val.jsonl", "test.jsonl", "ledger.jsonl", "set_aside.jsonl")
STORY = " ".join(f"word{n}" for n in range(40))


def write_rows(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    """30 stories of 80 words: as they are, with a word more (similarity 0.93), and with another half (about 0.5)."""
    told = [" ".join(f"word{number}x{n}" for n in range(80)) for number in range(30)]
    rows = [
        {"input": f"Story {number} {kind}?", "output": text}
        for number, story in enumerate(told)
        for kind, text in (("a", story), ("b", f"{story} more"), ("c", f"{story[: len(story) // 2]} {number} else"))
    ]
    return write_rows(tmp_path, rows)


answers = st.sampled_from([STORY, STORY.upper(), f"{STORY} more", f"{STORY} more and more", "yes", "Yes", "no", ""])
questions = st.sampled_from(["why", "Why", "how does it work", ""])


rows_with_options = st.lists(
    st.fixed_dictionaries(
        {
            "input": questions,
            "output": answers,
            "group": st.sampled_from(["a", "b", "c", None]),
            "split": st.sampled_from(["train", "test", None]),
        }
    ),
    max_size=12,
)
thresholds = st.sampled_from([None, 0.6, 0.8, 0.95])
shares = st.sampled_from([(0.8, 0.1, 0.1), (0.7, 0.15, 0.15), (1.0, 0.0, 0.0)])


decisions = st.tuples(thresholds, shares, st.sampled_from("st"))


def read_and_decided(folder: Path, source: Path, spec: DataImportSpec) -> dict[str, Any]:
    """What an import writes, into `folder`; returns its statistics."""
    folder.mkdir()
    with tempfile.TemporaryDirectory() as work, Curation(Path(work), Source.open(source), spec) as curation:
        curation.read()
        return curation.write(folder)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}


@given(rows_with_options, decisions, st.lists(decisions, min_size=1, max_size=2))
@settings(max_examples=8, deadline=None)
def test_deciding_again_is_importing_with_the_new_options_and_no_row_is_lost(
    rows: list[dict[str, Any]], first: tuple[Any, ...], later: list[tuple[Any, ...]]
) -> None:
    rows = [{"input": "always", "output": "good", "split": "train"}, *rows]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = write_rows(folder, rows)
        before, statistics = folder / "imported", {}
        for number, (threshold, parts, salt) in enumerate([first, *later, first]):
            spec = DataImportSpec(
                name="rows", format="chat", max_rejected_share=1, near_duplicates=threshold, split=parts, salt=salt
            )
            if number == 0:
                statistics = read_and_decided(before, source, spec)
                continue
            after, new = folder / f"after{number}", folder / f"new{number}"
            after.mkdir()
            with rows_of_version(before, spec, statistics) as read:
                decided = decide_rows(after, read, spec, folder / "index", silent)
            assert decided.statistics == read_and_decided(new, source, spec)
            assert bytes_of(after) == bytes_of(new)
            fates = [json.loads(line)["fate"] for line in (after / "ledger.jsonl").read_text().splitlines()]
            assert len(fates) == len(rows)
            assert Counter(fates) == +decided.fates
            assert sum(decided.part_sizes.values()) == decided.fates["kept"]
            before = after
        assert bytes_of(before) == bytes_of(folder / "imported")  # all that was decided between is undone


def test_another_threshold_changes_the_fates_and_hashes_nothing_again(workbench: Workbench, stories: Path) -> None:
    imported = import_dataset(workbench, stories, DataImportSpec(name="stories", near_duplicates=0.8))
    index = next(workbench.home.glob("datasets/*/duplicates/whole-rows"))
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in index.iterdir()}
    assert imported.fates[Fate.NEAR_DUPLICATE] == 30
    off = dedup(workbench, "stories", None)
    assert (Fate.NEAR_DUPLICATE in off.after.fates, off.after.num_examples, off.hashed) == (False, 90, False)
    back = dedup(workbench, "stories", 0.8)
    assert (back.after.id, back.after.sha256, back.hashed) == (imported.id, imported.sha256, False)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in index.iterdir()} == before
    assert [one.name for one in versions_of(workbench, "stories")] == ["stories", off.after.reference]


def test_the_first_search_of_rows_is_kept_for_the_next(workbench: Workbench, stories: Path) -> None:
    import_dataset(workbench, stories, DataImportSpec(name="stories"))
    assert dedup(workbench, "stories", 0.8).hashed
    assert not dedup(workbench, "stories", 0.9).hashed


def test_the_steps_are_recorded_with_what_they_read_and_how(workbench: Workbench, stories: Path) -> None:
    imported = import_dataset(workbench, stories, DataImportSpec(name="stories"))
    fewer = dedup(workbench, "stories", 0.8).after
    parted = split(workbench, "stories", {"split": (0.7, 0.15, 0.15)}).after
    assert [step.operation for step in parted.lineage] == ["import", "dedup", "split"]
    assert [step.sha256 for step in parted.lineage] == [imported.sha256, fewer.sha256, parted.sha256]
    source, *parents = [step.inputs[0] for step in parted.lineage]
    assert (source.kind, source.name, source.sha256) == ("source", str(stories), imported.source_sha256)
    assert [(one.id, one.sha256) for one in parents] == [(imported.id, imported.sha256), (fewer.id, fewer.sha256)]
    assert parted.lineage[1].spec == {"threshold": 0.8}
    assert parted.lineage[2].spec["split"] == [0.7, 0.15, 0.15]
    assert parted.lineage[2].spec["salt"] == "lorasmith"
    stored = Dataset.model_validate_json((workbench.path(parted.folder) / "dataset.json").read_bytes())
    assert stored.lineage == parted.lineage


def test_older_versions_stay_reachable_and_the_list_shows_the_newest(workbench: Workbench, stories: Path) -> None:
    imported = import_dataset(workbench, stories, DataImportSpec(name="stories"))
    fewer = dedup(workbench, "stories", 0.8).after
    assert [(one.name, one.id) for one in data.list_datasets(workbench)] == [("stories", fewer.id)]
    for digits in (imported.sha256[:4], imported.sha256[:12].upper(), imported.sha256):
        assert data.get_dataset(workbench, f"stories@{digits}").id == imported.id
    assert data.get_dataset(workbench, f"stories@{fewer.sha256[:8]}").id == fewer.id
    assert len(data.preview(workbench, f"stories@{imported.sha256[:8]}", 100)) == imported.part_sizes["train"]


def test_a_wrong_version_is_refused_with_those_that_there_are(workbench: Workbench, stories: Path) -> None:
    imported = import_dataset(workbench, stories, DataImportSpec(name="stories"))
    wrong = "0000" if not imported.sha256.startswith("0000") else "1111"
    with pytest.raises(NotFound) as caught:
        data.get_dataset(workbench, f"stories@{wrong}")
    assert caught.value.message == f"the dataset 'stories' has no version 'stories@{wrong}'"
    assert caught.value.hint == f"versions: {imported.reference}"
    with pytest.raises(InvalidSpec) as short:
        data.get_dataset(workbench, f"stories@{imported.sha256[:3]}")
    assert short.value.message == (
        f"'stories@{imported.sha256[:3]}' must have at least 4 digits of a digest behind the @"
    )


def test_digits_that_fit_several_versions_are_refused(workbench: Workbench, stories: Path) -> None:
    imported = import_dataset(workbench, stories, DataImportSpec(name="stories"))
    twin = imported.model_copy(
        update={"id": new_id("dataset"), "sha256": imported.sha256[:6] + "f" * 58, "name": "stories@twin"}
    )
    workbench.datasets.add(twin)
    with pytest.raises(InvalidSpec) as caught:
        data.get_dataset(workbench, f"stories@{imported.sha256[:6]}")
    assert caught.value.message == f"'stories@{imported.sha256[:6]}' fits 2 versions"
    assert caught.value.hint == f"versions: {imported.reference}, {twin.reference}"


def test_a_new_name_is_a_dataset_of_its_own(workbench: Workbench, stories: Path) -> None:
    imported = import_dataset(workbench, stories, DataImportSpec(name="stories"))
    fewer = dedup(workbench, "stories", 0.8, new_name="fewer").after
    assert [one.name for one in data.list_datasets(workbench)] == ["stories", "fewer"]
    assert fewer.lineage[-1].inputs[0].id == imported.id
    import_dataset(workbench, EXAMPLES / "support.jsonl", DataImportSpec(name="support"))
    with pytest.raises(Conflict) as caught:
        dedup(workbench, "stories", 0.9, new_name="support")
    assert caught.value.message == "there is already a dataset 'support', which was not derived from 'stories'"


def test_the_import_of_before_is_still_the_outcome_of_the_same_import(workbench: Workbench, stories: Path) -> None:
    spec = DataImportSpec(name="stories")
    imported = import_dataset(workbench, stories, spec)
    fewer = dedup(workbench, "stories", 0.8).after
    again = import_dataset(workbench, stories, spec)
    assert (again.id, again.name) == (imported.id, imported.reference)
    assert data.get_dataset(workbench, "stories").id == fewer.id


def test_a_dataset_without_its_import_cannot_be_decided_anew(workbench: Workbench, stories: Path) -> None:
    imported = import_dataset(workbench, stories, DataImportSpec(name="stories"))
    workbench.datasets.replace(imported.model_copy(update={"lineage": []}))
    with pytest.raises(InvalidData) as caught:
        dedup(workbench, "stories", 0.8)
    assert caught.value.message == (
        "the dataset 'stories' does not say which import it comes from, so it cannot be decided anew"
    )


def test_damaged_rows_are_not_decided_again(workbench: Workbench, stories: Path) -> None:
    imported = import_dataset(workbench, stories, DataImportSpec(name="stories"))
    path = workbench.path(imported.folder) / "train.jsonl"
    path.write_bytes(path.read_bytes().replace(b"word1x1 ", b"word9x9 "))
    with pytest.raises(InvalidData, match=r"is damaged: train\.jsonl does not match its checksum"):
        split(workbench, "stories", {"salt": "other"})


def test_what_cannot_be_decided_of_these_rows_is_refused_and_nothing_stays(
    workbench: Workbench, stories: Path, tmp_path: Path
) -> None:
    import_dataset(workbench, stories, DataImportSpec(name="stories"))
    pairs = [{"prompt": f"q{n}", "chosen": "good", "rejected": f"bad {n}"} for n in range(12)]
    import_dataset(workbench, write_rows(tmp_path, pairs, "pairs.jsonl"), DataImportSpec(name="pairs"))
    there = sorted(path.name for path in (workbench.home / "datasets").iterdir())
    with pytest.raises(InvalidSpec, match=r"say which of two answers is wanted: similar rows may say the opposite"):
        dedup(workbench, "pairs", 0.8)
    with pytest.raises(InvalidSpec) as caught:
        split(workbench, "stories", {"stratify": "label"})
    assert caught.value.message == (
        "--stratify label needs rows with a label (format classification or kto), and the dataset 'stories' has the "
        "format chat"
    )
    with pytest.raises(InvalidSpec, match=r"the similarity threshold must be between 0\.4 and 1, got 0\.2"):
        dedup(workbench, "stories", 0.2)
    assert sorted(path.name for path in (workbench.home / "datasets").iterdir()) == there


def test_a_stratified_split_holds_the_shares_of_each_label(workbench: Workbench, tmp_path: Path) -> None:
    rows = [{"text": f"note {n}", "label": "bad" if n % 10 == 0 else "good"} for n in range(400)]
    import_dataset(workbench, write_rows(tmp_path, rows), DataImportSpec(name="notes", exact=True))
    after = split(workbench, "notes", {"stratify": "label"}).after
    assert after.part_sizes == {"train": 320, "val": 40, "test": 40}
    for part, wanted in (("train", 32), ("val", 4), ("test", 4)):
        examples = data.preview(workbench, "notes", 400, part)  # type: ignore[arg-type]
        assert Counter(example.answer() for example in examples)["bad"] == wanted
    new = DataImportSpec(name="new", stratify="label")
    assert import_dataset(workbench, tmp_path / "rows.jsonl", new).sha256 == after.sha256
    back = split(workbench, "notes", {"exact": True}).after
    assert (back.spec and back.spec.stratify, back.lineage[-1].operation) == (None, "import")


def test_another_name_is_that_of_all_versions(workbench: Workbench, stories: Path) -> None:
    imported = import_dataset(workbench, stories, DataImportSpec(name="stories"))
    fewer = dedup(workbench, "stories", 0.8).after
    assert data.describe_dataset(workbench, "stories", "tales", "told").name == "tales"
    assert data.get_dataset(workbench, "tales").id == fewer.id
    assert data.get_dataset(workbench, f"tales@{imported.sha256[:8]}").id == imported.id
    assert versions_of(workbench, "stories") == []
    import_dataset(workbench, stories, DataImportSpec(name="stories"))
    with pytest.raises(Conflict, match="there is already a dataset named 'stories': dataset_"):
        data.describe_dataset(workbench, "tales", "stories", None)
