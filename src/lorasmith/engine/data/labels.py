"""A job that shows the labels of rows: what is trained, masked and cut, and which checks a row fails."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase

from lorasmith.engine.data.checks import CHECKS, CheckFailed
from lorasmith.engine.data.examples import read_examples
from lorasmith.engine.data.layout import token_layout
from lorasmith.engine.data.parts import trained_ones
from lorasmith.engine.data.rendering import RenderedExample
from lorasmith.engine.data.templates import choose_template
from lorasmith.engine.data.truncation import Fitted, Rendering, fit
from lorasmith.engine.models.loading import eos_token_ids, load_tokenizer, model_folder
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import InvalidSpec
from lorasmith.schemas.data import Example
from lorasmith.schemas.jobs import JobOrder
from lorasmith.schemas.labels import (
    FailedCheck,
    LabelInputs,
    LabelledExample,
    LabelledRow,
    LabelledToken,
    LabelReport,
    LabelSpec,
)


def run(order: JobOrder, folder: Path, report: Reporter) -> LabelReport:
    """The labels of each example of the file. The weights are not loaded. Raises `Interrupted` when asked to stop."""
    spec = LabelSpec.model_validate(order.spec)
    inputs = LabelInputs.model_validate(order.inputs)
    base_folder = model_folder(inputs.model_folder)
    tokenizer = load_tokenizer(base_folder)
    examples = read_examples(Path(inputs.examples_file))
    if spec.template is not None or any(example.messages is not None for example in examples):
        choose_template(tokenizer, spec.template)
    config: Any = AutoConfig.from_pretrained(base_folder)
    context = getattr(config, "max_position_embeddings", None) or spec.max_seq_length
    how = Rendering(tokenizer, stop_ids(base_folder, config, tokenizer), min(spec.max_seq_length, context), spec.allow)
    rows: list[LabelledRow] = []
    for example in examples:
        if report.stop_requested:
            raise report.stop(f"stopped after {len(rows)} of {len(examples)} rows")
        rows.append(labelled_row(how, example, spec))
    return LabelReport(max_tokens=how.max_tokens, too_long=spec.too_long, rows=rows)


def stop_ids(folder: Path, config: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The stop tokens of the model in that folder, as it has them once its weights are loaded."""
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    else:
        generation = GenerationConfig.from_model_config(config)
    return eos_token_ids(cast(nn.Module, SimpleNamespace(generation_config=generation)), tokenizer)


def labelled_row(how: Rendering, example: Example, spec: LabelSpec) -> LabelledRow:
    """What training would do with the row. A row that fails a check is shown as if the check were overridden."""
    failures: list[CheckFailed] = []
    row = rendered_past_failures(how, example, failures)
    lenient = replace(how, allow=[failure.check for failure in failures])
    whole = [Fitted(example, row, list(range(len(row.ids))))]
    over = f"{len(row.ids)} tokens, {len(row.ids) - how.max_tokens} more than {how.max_tokens}"
    fate, reason, fitted = "kept", None, whole
    try:
        fitted = trained_ones(how, fit(lenient, example, row, spec.too_long))
    except CheckFailed as failure:
        failures.append(failure)
        fitted = [] if failure.check in spec.allow else whole
    except InvalidSpec as error:
        fate, reason = "refused", error.message
    if not fitted and spec.too_long == "error" and not how.fits(row):
        fate, reason, fitted = "refused", f"{over}, and too_long is error", whole
    elif not fitted:
        fate, reason, fitted = "dropped", over if not how.fits(row) else "it trains nothing", [Fitted(example, row, [])]
    elif len(fitted) > 1:
        fate, reason = "split", f"{over}: {len(fitted)} examples"
    elif fitted[0].cut:
        fate, reason = "cut", over
    if any(failure.check not in spec.allow for failure in failures):
        fate = "refused"
    return LabelledRow(
        row=example.row,
        example_id=example.id,
        fate=fate,
        reason=reason,
        failed_checks=[
            FailedCheck(
                check=failure.check,
                sentence=failure.sentence,
                mend=CHECKS[failure.check].mend,
                overridden=failure.check in spec.allow,
            )
            for failure in failures
        ],
        examples=[labelled_example(how, piece) for piece in fitted],
    )


def rendered_past_failures(how: Rendering, example: Example, failures: list[CheckFailed]) -> RenderedExample:
    """The row with each failing check overridden; the failures are added to the list."""
    while True:
        try:
            return replace(how, allow=[failure.check for failure in failures]).render(example)
        except CheckFailed as failure:
            failures.append(failure)


def labelled_example(how: Rendering, piece: Fitted) -> LabelledExample:
    """The tokens of a piece with those that were cut from it between them."""
    layout = token_layout(how.tokenizer, piece.example)
    special = {token for token, added in how.tokenizer.added_tokens_decoder.items() if added.special}
    kept = dict(zip(piece.kept, piece.row.trained, strict=True))
    first = min(kept, default=None)  # nothing stands before it, so it is never predicted
    tokens = []
    for position in piece.kept if piece.window else range(len(piece.whole.ids)):
        token = piece.whole.ids[position]
        carries_loss = kept.get(position, False) and position != first
        tokens.append(
            LabelledToken(
                id=token,
                text=layout.texts[position],
                role="cut" if position not in kept else "trained" if carries_loss else "masked",
                is_stop=token in how.stop_ids,
                is_special=token in special,
            )
        )
    return LabelledExample(
        tokens=tokens,
        total=len(tokens),
        trained=sum(token.role == "trained" for token in tokens),
        cut=piece.cut,
        stop_trained=answers_stop(tokens),
    )


def answers_stop(tokens: list[LabelledToken]) -> bool:
    """Whether each run of trained tokens ends with a stop token."""
    left = [token for token in tokens if token.role != "cut"]
    answers = [list(run) for role, run in groupby(left, key=lambda token: token.role) if role == "trained"]
    return bool(answers) and all(answer[-1].is_stop for answer in answers)
