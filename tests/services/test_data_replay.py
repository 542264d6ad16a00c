"""A chain that runs again gives its digests, and says where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorasmith.errors import InvalidData, NotFound
from lorasmith.schemas.data import DataImportSpec
from lorasmith.schemas.data_lineage import DataStep
from lorasmith.services import data
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_redeciding import dedup, split
from lorasmith.services.data_replay import replay
from lorasmith.services.workbench import Workbench

STORY = " ".join(f"word{n}" for n in range(60))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    lines = [f"question {n}?,{STORY} {n % 10}{more}\n" for n in range(40) for more in ("", " more")]
    path.write_text("input,output\n" + "".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def chain(workbench: Workbench, source: Path) -> list[str]:
    """Digests of the versions that import, dedup and split make."""
    imported = import_dataset(workbench, source, DataImportSpec(name="rows"))
    fewer = dedup(workbench, "rows", 0.9).after
    parted = split(workbench, "rows", {"split": (0.7, 0.15, 0.15), "salt": "s"}).after
    assert len({imported.sha256, fewer.sha256, parted.sha256}) == 3
    return [imported.sha256, fewer.sha256, parted.sha256]


def test_a_replay_gives_every_digest_again_and_stores_nothing(workbench: Workbench, chain: list[str]) -> None:
    there = sorted(path.name for path in (workbench.home / "datasets").iterdir())
    done = replay(workbench, "rows")
    assert done.equal
    assert [(step.operation, step.replayed, step.difference) for step in done.steps] == [
        ("import", chain[0], None),
        ("dedup", chain[1], None),
        ("split", chain[2], None),
    ]
    assert replay(workbench, f"rows@{chain[0][:12]}").steps == done.steps[:1]
    assert sorted(path.name for path in (workbench.home / "datasets").iterdir()) == there
    assert len(data.list_datasets(workbench)) == 1


def test_a_source_that_changed_is_named_with_what_follows_from_it(
    workbench: Workbench, chain: list[str], source: Path
) -> None:
    recorded = data.get_dataset(workbench, "rows").source_sha256
    with source.open("a", encoding="utf-8") as file:
        file.write("One more?,Yes.\n")
    done = replay(workbench, "rows")
    assert not done.equal
    assert [step.equal for step in done.steps] == [False, False, False]
    first, second, _ = done.steps
    assert first.difference is not None
    assert first.difference.startswith(f"the source changed: its sha256 was {recorded}, now it is ")
    assert second.difference == "what it started from is another"


def test_another_outcome_of_the_same_input_is_named_with_the_program_that_made_it(
    workbench: Workbench, chain: list[str]
) -> None:
    dataset = data.get_dataset(workbench, "rows")
    altered = dataset.lineage[1].model_copy(update={"sha256": "0" * 64, "lorasmith": "0.0.9"})
    workbench.datasets.replace(
        dataset.model_copy(update={"lineage": [dataset.lineage[0], altered, dataset.lineage[2]]})
    )
    done = replay(workbench, "rows")
    assert [step.equal for step in done.steps] == [True, False, True]
    assert done.steps[1].difference is not None
    assert done.steps[1].difference.startswith(
        "the same input gave something else: it was made by lorasmith 0.0.9, this is "
    )


def test_a_source_that_is_gone_is_named_and_one_that_was_moved_is_read(
    workbench: Workbench, chain: list[str], source: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere" / "other.csv"
    moved.parent.mkdir()
    source.rename(moved)
    with pytest.raises(NotFound) as caught:
        replay(workbench, "rows")
    assert caught.value.message == f"the source of 'rows' is not there: {source}"
    assert caught.value.hint == "name the place where it is now: --source PATH"
    assert replay(workbench, "rows", source=moved).equal


def test_a_step_of_another_stage_is_not_replayed(workbench: Workbench, chain: list[str]) -> None:
    dataset = data.get_dataset(workbench, "rows")
    foreign = DataStep(operation="distil", spec={}, inputs=[], sha256=dataset.sha256, lorasmith="0.1.0")
    workbench.datasets.replace(dataset.model_copy(update={"lineage": [*dataset.lineage, foreign]}))
    with pytest.raises(InvalidData) as caught:
        replay(workbench, "rows")
    assert caught.value.message == ("the dataset 'rows' was made by a step that does not run again by itself: distil")
