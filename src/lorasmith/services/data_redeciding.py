"""New versions of a dataset from the rows that its import read: other near duplicates, another split.

The rows are those of the parts and those that were set aside, so the outcome is that of an import with the new options,
byte for byte; the source is not read, and rows whose search index is there are not hashed again.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.errors import InvalidData
from lorasmith.files import disk_errors, scratch_folder, verify_manifest
from lorasmith.schemas.data import PARTS, STAYS, DataImportSpec, Dataset, Example, Fate, LedgerLine, Part, SetAside
from lorasmith.schemas.data_lineage import DedupSpec, SplitSpec, StepInput
from lorasmith.services.data_decision import check_decision, decide_rows, fate_counts
from lorasmith.services.data_index import ImportIndex
from lorasmith.services.data_parts import LEDGER, SET_ASIDE, ReadRows, content_digest, lines, open_text
from lorasmith.services.data_progress import Report, silent
from lorasmith.services.data_split import group_position
from lorasmith.services.data_versions import (
    free_or_same_name,
    input_of,
    recorded_step,
    require_version,
    source_step,
    store_version,
)

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy


@dataclass(frozen=True)
class Redecision:
    """`after` is `before` where nothing changed; `hashed` is true where rows had to be hashed for it."""

    before: Dataset
    after: Dataset
    hashed: bool = False


def dedup(
    workbench: Workbench, name: str, threshold: float | None, *, new_name: str | None = None, report: Report = silent
) -> Redecision:
    """Take out the near duplicates from a threshold (0.4 to 1) on, or with None bring all of them back."""
    from lorasmith.services.data_duplicates.signatures import rows_per_band  # it imports numpy
    from lorasmith.services.data_duplicates.stored import stored_index_of_rows

    if threshold is not None:
        rows_per_band(threshold)
    before = require_version(workbench, name)
    hashed = threshold is not None and not stored_index_of_rows(workbench, before).exists()
    after = decide_again(workbench, before, "dedup", DedupSpec(threshold=threshold).model_dump(), new_name, report)
    return Redecision(before, after, hashed)


def split(
    workbench: Workbench, name: str, changes: dict[str, Any], *, new_name: str | None = None, report: Report = silent
) -> Redecision:
    """Assign the parts anew. `changes` are fields of `SplitSpec`; those that are absent stay as they are, save that of
    `exact` and `stratify` the one that is asked for ends the other."""
    before = require_version(workbench, name)
    source_step(before)
    assert before.spec is not None
    now = before.spec.model_dump(include=set(SplitSpec.model_fields))
    ended = {"exact": False} if changes.get("stratify") else {"stratify": None} if changes.get("exact") else {}
    wanted = SplitSpec.model_validate({**now, **ended, **changes})
    after = decide_again(workbench, before, "split", wanted.model_dump(mode="json"), new_name, report)
    return Redecision(before, after)


def spec_with(spec: DataImportSpec, operation: str, values: dict[str, Any]) -> DataImportSpec:
    """The options of an import that would decide as this one does after the step, but for what leaks."""
    changes = {"split": values, "dedup": {"near_duplicates": values.get("threshold")}}.get(operation, {})
    return DataImportSpec.model_validate({**spec.model_dump(), **changes})


def decide_again(
    workbench: Workbench,
    before: Dataset,
    operation: str,
    values: dict[str, Any],
    new_name: str | None,
    report: Report,
    *,
    leaks: Mapping[int, str] | None = None,
    inputs: Sequence[StepInput] = (),
) -> Dataset:
    """The version that a step makes of another one. `leaks` names rows that are taken out, by what they hold."""
    from lorasmith.services.data_duplicates.stored import stored_index_of_rows  # it imports numpy

    source_step(before)
    assert before.spec is not None
    name = new_name or before.plain_name
    if new_name:
        free_or_same_name(workbench, new_name, before)
    spec = spec_with(before.spec, operation, values).model_copy(update={"name": name})
    check_decision(spec, before.format, f"the dataset {before.name!r}")
    stored = workbench.path(before.folder)
    verify_manifest(stored)

    def fill(folder: Path, dataset_id: str) -> Dataset:
        with rows_of_version(stored, spec, before.statistics, leaks or {}) as read:
            decided = decide_rows(folder, read, spec, stored_index_of_rows(workbench, before), report)
        sha256 = content_digest(folder)
        step = recorded_step(operation, values, [input_of(before), *inputs], sha256)
        changed = {
            "id": dataset_id,
            "name": name,
            "spec": spec,
            "sha256": sha256,
            "lineage": [*before.lineage, step],
            "folder": f"datasets/{dataset_id}",
            "num_examples": sum(decided.part_sizes.values()),
            "part_sizes": decided.part_sizes,
            "fates": fate_counts(decided.fates),
            "statistics": decided.statistics,
            "created_at": step.created_at,
        }
        return before.model_copy(update=changed)

    return store_version(workbench, name, fill)


@contextmanager
def rows_of_version(
    stored: Path, spec: DataImportSpec, statistics: dict[str, Any], leaks: Mapping[int, str] | None = None
) -> Iterator[ReadRows]:
    """The rows of a version as they were read, in a hidden folder beside it, with the groups of the spec's salt.

    `leaks` marks rows by what they hold; rows that are marked already stay so. Raises `InvalidData` for leaving none.
    """
    fates: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    pinned: Counter[Part] = Counter()
    with (
        disk_errors(stored),
        scratch_folder(stored.parent) as folder,
        ImportIndex(folder / "index.sqlite") as index,
    ):
        num_rows = staying = 0
        with open_text(folder / "rows.jsonl") as rows, open_text(folder / LEDGER) as ledger:
            for line, example in undecided(stored):
                num_rows += 1
                if leaks and example is not None and line.leaks_into is None:
                    line.leaks_into = leaks.get(line.row)
                fates[line.fate.value] += 1
                ledger.write(line.model_dump_json(exclude_none=True) + "\n")
                if example is None:
                    continue
                rows.write(example.model_dump_json(exclude_none=True) + "\n")
                findings.update({finding.check for finding in line.flags or ()})
                if line.leaks_into is None:
                    index.add_to_group(example.group, group_position(example.group, spec.salt), line.asked_part)
                    staying += 1
                    if line.asked_part is not None:
                        pinned[line.asked_part] += 1
        if not staying:
            raise InvalidData("every row holds an item, so nothing would be left", hint="raise the similarity")
        yield ReadRows(
            rows=folder / "rows.jsonl",
            ledger=folder / LEDGER,
            index=index,
            num_rows=num_rows,
            fates=fates,
            findings=findings,
            pinned=pinned,
            ignored=statistics.get("ignored_fields", {}),
            languages=statistics.get("languages", {}),
        )


def undecided(stored: Path) -> Iterator[tuple[LedgerLine, Example | None]]:
    """Every line of the ledger as it was read, and its example where it has one, in the order of the input rows."""
    parts = [map(Example.model_validate_json, lines(stored / f"{part}.jsonl")) for part in PARTS]
    examples = heapq.merge(*parts, key=lambda example: example.row)
    taken_out = stored_set_aside(stored)
    for text in lines(stored / LEDGER):
        line = LedgerLine.model_validate_json(text)
        if line.fate in (Fate.NEAR_DUPLICATE, Fate.LEAKS):
            aside = next(taken_out)
            yield aside.line, aside.example
        elif line.fate in STAYS:
            example = next(examples)
            own_group = line.own_group or example.group
            yield (
                line.model_copy(update={"part": None, "own_group": None}),
                example.model_copy(update={"group": own_group}),
            )
        else:
            yield line, None


def stored_set_aside(stored: Path) -> Iterator[SetAside]:
    path = stored / SET_ASIDE
    return map(SetAside.model_validate_json, lines(path)) if path.exists() else iter(())
