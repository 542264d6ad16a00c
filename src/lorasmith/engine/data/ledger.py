"""A job that tells what a training run makes of each row. It leaves the token stores for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from lorasmith.engine.data.examples import has_conversations
from lorasmith.engine.data.labels import stop_ids
from lorasmith.engine.data.parts import Fitting, RowOutcome, fit_row, fitted_part, whole_rows
from lorasmith.engine.data.rows import Rows, StoredRows
from lorasmith.engine.data.templates import choose_template
from lorasmith.engine.data.tokenizing import tokenized
from lorasmith.engine.data.truncation import Rendering
from lorasmith.engine.models.loading import load_tokenizer, model_folder
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.schemas.data import Fate, Part, TooLong
from lorasmith.schemas.data_ledger import LedgerInputs, LedgerSpec, TrainedRow, TrainedRows
from lorasmith.schemas.jobs import JobOrder


def run(order: JobOrder, folder: Path, report: Reporter) -> TrainedRows:
    """Fit the rows as a run does, past those that stop it. The weights are not loaded. Raises `Interrupted` when asked to stop."""
    spec = LedgerSpec.model_validate(order.spec)
    inputs = LedgerInputs.model_validate(order.inputs)
    report("phase", name="tokenize")
    base_folder = model_folder(inputs.model_folder, weights=False)
    tokenizer = load_tokenizer(base_folder)
    if spec.template is not None or has_conversations(Path(inputs.train_file)):
        choose_template(tokenizer, spec.template)
    config: Any = AutoConfig.from_pretrained(base_folder)
    context = getattr(config, "max_position_embeddings", None) or spec.max_seq_length
    stops = stop_ids(base_folder, config, tokenizer)
    how = Rendering(tokenizer, stops, min(spec.max_seq_length, context), spec.allow)
    found = TrainedRows(max_tokens=how.max_tokens, parts={})
    parts: list[tuple[Part, str | None, TooLong]] = [
        ("train", inputs.train_file, spec.too_long),
        ("val", inputs.val_file, "drop"),  # as a run has it
    ]
    for part, path, too_long in parts:
        if path is not None:
            store = tokenized(Path(path), Path(inputs.tokens_folder), tokenizer, stops, report)
            rows = StoredRows(store, Path(path))
            found.parts[part], stopped = fitted_rows(how, rows, too_long, report, may_be_empty=part == "val")
            if stopped is not None and found.stops is None:
                found.stops = f"{part}: {stopped}"
    return found


def fitted_rows(
    how: Rendering, rows: Rows, too_long: TooLong, report: Reporter, *, may_be_empty: bool
) -> tuple[list[TrainedRow], str | None]:
    """The rows that are not trained as they stand, in order, and what a run would raise."""
    fitting = Fitting()
    whole = whole_rows(how, rows, fitting)
    stops: str | None = None
    for index in np.flatnonzero(~whole).tolist():
        if report.stop_requested:
            raise report.stop(f"stopped at row {rows.row(index).row}; what was tokenized is kept")
        try:
            fit_row(how, rows, index, too_long, fitting)
        except InvalidSpec as error:  # its template lets it not be cut; a run ends here
            stops = stops or error.message
            fitting.refuse(index, error.message)
    if stops is None:
        try:
            fitted_part(how, rows, whole, fitting, may_be_empty=may_be_empty)
        except (InvalidData, InvalidSpec) as error:
            stops = error.message
    return [trained_row(rows, index, outcome) for index, outcome in sorted(fitting.outcomes.items())], stops


def trained_row(rows: Rows, index: int, outcome: RowOutcome) -> TrainedRow:
    if outcome.refused is not None:
        fate = Fate.REFUSED
    elif outcome.examples == 0:
        fate = Fate.DROPPED
    else:
        fate = Fate.SPLIT if outcome.examples > 1 else Fate.CUT
    return TrainedRow(
        row=rows.row(index).row,
        fate=fate,
        tokens=int(rows.lengths[index]),
        cut_tokens=outcome.cut_tokens,
        examples=outcome.examples,
        refused=outcome.refused,
    )
