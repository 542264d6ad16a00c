"""The ledger of a dataset as a model is trained on it: which rows a run cuts, splits, leaves out or refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import Conflict
from lorasmith.files import new_id, read_json
from lorasmith.jobs.folder import ORDER
from lorasmith.schemas.data import Dataset, Fate, LedgerLine
from lorasmith.schemas.data_ledger import LedgerInputs, LedgerSpec, LedgerSummary, TrainedRow, TrainedRows
from lorasmith.schemas.jobs import JobKind, JobOrder
from lorasmith.schemas.training import TrainingInputs, TrainingSpec
from lorasmith.services.data import ledger_lines, part_path, tokens_folder
from lorasmith.services.data_decision import fate_counts
from lorasmith.services.data_sources import find_dataset
from lorasmith.services.data_versions import require_version
from lorasmith.services.jobs import Watch, show_job
from lorasmith.services.models import resolve_model
from lorasmith.services.previews import preview_folder, run_preview
from lorasmith.services.training import build_spec
from lorasmith.services.workbench import Workbench


@dataclass(frozen=True)
class TrainingLedger:
    """A dataset and what a run with that spec makes of its rows."""

    dataset: Dataset
    spec: LedgerSpec
    found: TrainedRows

    def lines(self, lines: Iterable[LedgerLine]) -> Iterator[LedgerLine]:
        """Lines of the dataset's ledger, with their fate in training where a row is not trained as it stands."""
        rows = {row.row: row for part in self.found.parts.values() for row in part}
        for line in lines:
            row = rows.get(line.row)
            yield line if row is None else line.model_copy(update=self.fate_of(row))

    def fate_of(self, row: TrainedRow) -> dict[str, Any]:
        over = row.tokens - self.found.max_tokens
        length = f"{row.tokens} tokens, {over} more than {self.found.max_tokens}" if over > 0 else "it trains nothing"
        made = {
            Fate.CUT: f"{row.tokens} tokens, {row.cut_tokens} of them cut",
            Fate.SPLIT: f"{row.tokens} tokens, {row.examples} examples of them"
            + (f", {row.cut_tokens} cut" if row.cut_tokens else ""),
            Fate.DROPPED: length,
            Fate.REFUSED: f"{length}: {row.refused}" if over > 0 else row.refused,
        }
        return {
            "fate": row.fate,
            "rendered_tokens": row.tokens,
            "cut_tokens": row.cut_tokens,
            "examples": row.examples,
            "reason": made[row.fate],
        }


def training_ledger(workbench: Workbench, name: str, asked: dict[str, Any], watch: Watch) -> TrainingLedger:
    """As `lorasmith train` with these values would train on it: `model`, `preset`, `template` and fields of `training`."""
    dataset = find_dataset(workbench, name)
    spec = build_spec({"data": name, **asked}, home=workbench.home)
    model = resolve_model(workbench, spec.model, weights=False)
    validation = part_path(workbench, dataset, "val") if dataset.part_sizes.get("val") else None
    return examined(workbench, dataset, spec, model.location, validation, watch)


def ledger_of_job(workbench: Workbench, name: str, job_name: str, watch: Watch) -> TrainingLedger:
    """As that training job trains, or trained, on the dataset. Raises `Conflict` for a job on another version."""
    dataset, job = require_version(workbench, name), show_job(workbench, job_name)
    if job.kind is not JobKind.TRAINING:
        raise Conflict(f"{job.id} is a job of kind {job.kind}, and only training has a ledger")
    order = JobOrder.model_validate(read_json(workbench.path(job.folder) / ORDER))
    inputs = TrainingInputs.model_validate(order.inputs)
    if inputs.dataset_id != dataset.id:
        used = f"{inputs.dataset_name.partition('@')[0]}@{inputs.dataset_sha256[:12]}"
        raise Conflict(
            f"{job.id} does not train on {dataset.reference} but on {used}",
            hint=f"lorasmith data ledger {used} --job {job_name}",
        )
    own = part_path(workbench, dataset, "val")
    validation = own if inputs.val_file and Path(inputs.val_file) == own else None
    spec = TrainingSpec.model_validate(order.spec)
    return examined(workbench, dataset, spec, inputs.model_folder, validation, watch)


def examined(
    workbench: Workbench,
    dataset: Dataset,
    training: TrainingSpec,
    model_folder: str,
    validation: Path | None,
    watch: Watch,
) -> TrainingLedger:
    """Ask an engine process; nothing but the token store, which the run reads too, is left."""
    spec = LedgerSpec(
        model=training.model,
        template=training.template,
        **training.training.model_dump(include={"max_seq_length", "too_long", "allow"}),
    )
    inputs = LedgerInputs(
        model_folder=model_folder,
        train_file=str(part_path(workbench, dataset, "train")),
        val_file=str(validation) if validation else None,
        tokens_folder=str(tokens_folder(workbench, dataset.id)),
    )
    job_id = new_id("job")
    order = JobOrder(id=job_id, kind=JobKind.LEDGER, spec=spec.model_dump(), inputs=inputs.model_dump())
    found = TrainedRows.model_validate(run_preview(preview_folder(workbench, job_id), order, watch))
    return TrainingLedger(dataset, spec, found)


def ledger_summary(workbench: Workbench, name: str, training: TrainingLedger | None = None) -> LedgerSummary:
    """The fates of all rows; each row has one."""
    dataset = training.dataset if training else require_version(workbench, name)
    lines: Iterable[LedgerLine] = ledger_lines(workbench, dataset.id)
    fates: Counter[Fate] = Counter()
    cut_tokens = 0
    for line in training.lines(lines) if training else lines:
        fates[line.fate] += 1
        cut_tokens += line.cut_tokens or 0
    summary = LedgerSummary(dataset=dataset.name, sha256=dataset.sha256, rows=fates.total(), fates=fate_counts(fates))
    if training is None:
        return summary
    found = training.found
    facts = {"cut_tokens": cut_tokens, "max_tokens": found.max_tokens, "stops": found.stops}
    return summary.model_copy(update={**facts, "too_long": training.spec.too_long})
