"""Rows that hold what a model is tested on have their fate, stay out when decided anew, and come back when asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorasmith.errors import InvalidData
from lorasmith.schemas.data import DataImportSpec, Dataset, Fate
from lorasmith.services import data
from lorasmith.services.data_decontamination import decontaminate
from lorasmith.services.data_duplicates.leaks import find_contamination, find_leakage
from lorasmith.services.data_import import import_dataset
from lorasmith.services.data_redeciding import dedup, split
from lorasmith.services.data_removal import users_of
from lorasmith.services.data_replay import replay
from lorasmith.services.data_versions import restore_version
from lorasmith.services.workbench import Workbench

CLIPS = "How many clips did Natalia sell altogether in April and May, if she sold 48 in April?"
STORY = " ".join(f"word{n}" for n in range(60))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    items = [{"question": "How old is Ann?", "answer": "12"}, {"question": CLIPS, "answer": "72"}]
    return write_rows(tmp_path / "bench.jsonl", items)


@pytest.fixture
def rows(workbench: Workbench, tmp_path: Path) -> Dataset:
    """Rows 1 and 2 are near duplicates and hold item 2 of the benchmark; of row 3 there is a near copy in row 4."""
    pairs = [
        (CLIPS, "72 clips " + STORY),
        (CLIPS, f"72 clips {STORY} more"),
        ("Tell!", STORY),
        ("Tell it!", f"{STORY} x"),
    ]
    told = [{"input": question, "output": answer} for question, answer in pairs]
    told += [{"input": f"question {n}", "output": f"answer {n}"} for n in range(60)]
    return import_dataset(workbench, write_rows(tmp_path / "rows.jsonl", told), DataImportSpec(name="rows"))


def leaks(workbench: Workbench, name: str = "rows") -> list[tuple[int, str | None]]:
    return [(line.row, line.leaks_into) for line in data.ledger_lines(workbench, name, Fate.LEAKS)]


def test_rows_that_hold_an_item_leave_every_part_and_the_ledger_says_which(
    workbench: Workbench, rows: Dataset, benchmark: Path
) -> None:
    after = decontaminate(workbench, "rows", str(benchmark)).after
    assert leaks(workbench) == [(1, "bench.jsonl item 2 (exact)"), (2, "bench.jsonl item 2 (exact)")]
    assert (after.fates[Fate.LEAKS], after.num_examples) == (2, 62)
    assert sum(after.fates.values()) == 64
    assert [line.row for line in data.ledger_lines(workbench, "rows")] == list(range(1, 65))
    for part in ("train", "val", "test"):
        assert find_contamination(workbench, "rows", str(benchmark), part).held == 0  # type: ignore[arg-type]
    step = after.lineage[-1]
    assert (step.operation, step.spec) == (
        "decontaminate",
        {"benchmark": str(benchmark), "similarity": 0.8, "column_map": {}},
    )
    assert [one.kind for one in step.inputs] == ["dataset", "benchmark"]


def test_what_leaks_stays_out_whatever_is_decided_later_and_restoring_brings_it_back(
    workbench: Workbench, rows: Dataset, benchmark: Path
) -> None:
    first = decontaminate(workbench, "rows", str(benchmark)).after
    fewer = dedup(workbench, "rows", 0.8).after
    assert {fate: count for fate, count in fewer.fates.items() if count} == {
        Fate.KEPT: 61,
        Fate.NEAR_DUPLICATE: 1,
        Fate.LEAKS: 2,
    }
    split(workbench, "rows", {"salt": "other"})
    assert len(leaks(workbench)) == 2
    split(workbench, "rows", {"salt": "lorasmith"})
    assert dedup(workbench, "rows", None).after.id == first.id
    assert restore_version(workbench, rows.reference).id == rows.id
    assert leaks(workbench) == []
    assert data.get_dataset(workbench, "rows").id == rows.id


def test_near_duplicates_that_are_out_are_searched_too(workbench: Workbench, rows: Dataset, benchmark: Path) -> None:
    fewer = dedup(workbench, "rows", 0.8).after
    assert fewer.fates[Fate.NEAR_DUPLICATE] == 2
    decontaminate(workbench, "rows", str(benchmark))
    assert [row for row, _ in leaks(workbench)] == [1, 2]
    dedup(workbench, "rows", None)
    assert [row for row, _ in leaks(workbench)] == [1, 2]


def test_rows_of_train_that_hold_held_out_rows_are_taken_out(workbench: Workbench, tmp_path: Path) -> None:
    told = [{"input": f"question {n}", "output": f"answer {n}"} for n in range(30)]
    told += [{"input": "Tell!", "output": STORY, "split": "train"}, {"input": "Tell it!", "output": f"{STORY} x"}]
    told[-1]["split"] = "test"
    import_dataset(workbench, write_rows(tmp_path / "rows.jsonl", told), DataImportSpec(name="rows"))
    assert find_leakage(workbench, "rows")[1].held == 1
    after = decontaminate(workbench, "rows", None).after
    ((row, held),) = leaks(workbench)
    assert row == 31
    assert held is not None
    assert held.startswith("test row 32 (")
    assert [report.held for report in find_leakage(workbench, "rows")] == [0, 0]
    assert after.lineage[-1].spec == {"benchmark": None, "similarity": 0.8, "column_map": {}}
    assert replay(workbench, "rows").equal


def test_a_dataset_as_benchmark_is_its_version_and_is_used(
    workbench: Workbench, rows: Dataset, benchmark: Path
) -> None:
    items = import_dataset(workbench, benchmark, DataImportSpec(name="items", split=(1, 0, 0)))
    after = decontaminate(workbench, "rows", "items").after
    assert leaks(workbench)[0] == (1, f"{items.reference} item 2 (exact)")
    assert [user.id for user in users_of(workbench, [items])] == [after.id]
    assert replay(workbench, "rows").equal


def test_a_replay_searches_again_and_names_a_benchmark_that_changed(
    workbench: Workbench, rows: Dataset, benchmark: Path
) -> None:
    decontaminate(workbench, "rows", str(benchmark))
    dedup(workbench, "rows", 0.8)
    assert replay(workbench, "rows").equal
    write_rows(benchmark, [{"question": "question 7", "answer": "answer 7"}])
    done = replay(workbench, "rows")
    assert [step.equal for step in done.steps] == [True, False, False]
    assert done.steps[1].difference is not None
    assert done.steps[1].difference.startswith(f"the benchmark {benchmark} changed: its sha256 was ")
    benchmark.unlink()
    with pytest.raises(InvalidData) as caught:
        replay(workbench, "rows")
    assert caught.value.message == f"the benchmark {benchmark}, by which rows were taken out, is not there any more"


def test_the_columns_of_a_benchmark_are_mapped_also_in_a_replay(
    workbench: Workbench, rows: Dataset, tmp_path: Path
) -> None:
    (tmp_path / "own.csv").write_text(f'prompt\n"{CLIPS}"\n', encoding="utf-8")
    decontaminate(workbench, "rows", str(tmp_path / "own.csv"), column_map={"text": "prompt"})
    assert [row for row, _ in leaks(workbench)] == [1, 2]
    assert replay(workbench, "rows").equal


def test_a_benchmark_that_is_all_of_the_dataset_is_refused(workbench: Workbench, rows: Dataset) -> None:
    with pytest.raises(InvalidData) as caught:
        decontaminate(workbench, "rows", "rows")
    assert caught.value.message == "every row holds an item, so nothing would be left"
    assert caught.value.hint == "raise the similarity"
