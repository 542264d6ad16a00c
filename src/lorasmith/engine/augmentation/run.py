"""An augmentation job: ask a teacher about each row, several at a time, and keep what it says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Literal

from lorasmith.engine.augmentation import prompts
from lorasmith.engine.augmentation.answers import BadAnswer, Texts, read_texts
from lorasmith.engine.augmentation.rows import RowBook, before_request, read_examples, request_of, usable, why_not
from lorasmith.engine.reporting import Reporter
from lorasmith.engine.teachers.client import Messages, NoAnswer
from lorasmith.engine.teachers.ledger import RequestLedger
from lorasmith.engine.teachers.limits import BudgetSpent
from lorasmith.engine.teachers.teacher import Stopping, Teacher
from lorasmith.errors import LorasmithError, Paused, TeacherFailed
from lorasmith.schemas.augmentation import (
    AugmentationInputs,
    AugmentationMethod,
    AugmentationResult,
    AugmentationSpec,
    AugmentedRow,
    RowReason,
)
from lorasmith.schemas.data import Example
from lorasmith.schemas.jobs import JobOrder

Ask = Callable[[str, Messages], Awaitable[Texts]]

POLL_S = 0.2
REPORT_EVERY_S = 0.5
GRACE_S = 30.0  # for answers under way when the job is asked to stop: they are paid for
HOPELESS_AFTER = 8  # rows after each other without an answer
USELESS_AFTER = 25  # rows after each other whose answers, which are paid for, are not what was asked for


def run(order: JobOrder, folder: Path, report: Reporter) -> AugmentationResult:
    spec = AugmentationSpec.model_validate(order.spec)
    inputs = AugmentationInputs.model_validate(order.inputs)
    with RequestLedger(folder) as ledger:
        return asyncio.run(augment(spec, inputs, RowBook(folder), ledger, report))


async def augment(
    spec: AugmentationSpec, inputs: AugmentationInputs, rows: RowBook, ledger: RequestLedger, report: Reporter
) -> AugmentationResult:
    """Raises `Interrupted` or its kin when stopped, `Paused` when the budget is spent, `TeacherFailed` when it is vain."""
    began = time.monotonic()
    path = Path(inputs.train_file)
    ledger.forget_rows(rows.finished())
    total = sum(1 for _ in usable(path, spec.method, spec.max_rows))
    note_skipped(spec, path, rows)
    report("phase", name="ask")
    async with Teacher(spec.teacher, inputs.reach, ledger) as teacher:
        work = Work(spec, teacher, rows, total, report)
        await work.finish(usable(path, spec.method, spec.max_rows))
    if work.error is not None:
        raise work.error
    so_far = f"{work.done} of {total} rows are done"
    if work.budget is not None:
        raise Paused(
            f"the budget of {work.budget} is spent, {so_far}",
            hint="lorasmith data augment --resume JOB with a greater --budget-requests or --budget-tokens",
        )
    if report.stop_requested and work.done < total:
        raise report.stop(f"stopped, {so_far}", hint="lorasmith data augment --resume JOB goes on")
    return AugmentationResult(
        rows=rows.counts(),
        requests=ledger.asked,
        repeated_requests=ledger.repeated,
        prompt_tokens=ledger.prompt_tokens,
        completion_tokens=ledger.completion_tokens,
        estimated_answers=ledger.estimated,
        seconds=round(time.monotonic() - began, 3),
    )


def note_skipped(spec: AugmentationSpec, path: Path, rows: RowBook) -> None:
    """A line for each row that the method cannot be used on, up to the last row that is asked about."""
    left = spec.max_rows
    for example in read_examples(path):
        if left == 0:
            return
        reason = why_not(example, spec.method)
        if reason is None:
            left = left - 1 if left is not None else None
        elif not rows.is_done(example):
            rows.add(line_of(example, spec, "skipped", reason="unsuitable", sentence=reason))


class Work:
    """The rows that are asked about, and the tasks that share them."""

    def __init__(self, spec: AugmentationSpec, teacher: Teacher, rows: RowBook, total: int, report: Reporter) -> None:
        self.spec = spec
        self.teacher = teacher
        self.rows = rows
        self.total = total
        self.report = report
        self.done = 0
        self.in_a_row = {"failed": 0, "rejected": 0}  # since the last row with texts
        self.error: LorasmithError | None = None
        self.budget: BudgetSpent | None = None
        self.reported_at = 0.0

    async def finish(self, examples: Iterator[Example]) -> None:
        """Return when every row is done, or when the job has to stop and what was under way has ended."""
        tasks = [asyncio.create_task(self.take(examples)) for _ in range(self.spec.teacher.concurrency)]
        listener = asyncio.create_task(self.listen())
        try:
            stopped_at: float | None = None
            pending = set(tasks)
            while pending:
                _, pending = await asyncio.wait(pending, timeout=POLL_S)
                if self.teacher.stopping.is_set():
                    stopped_at = stopped_at or time.monotonic()
                    if time.monotonic() - stopped_at > GRACE_S:
                        for task in pending:
                            task.cancel()
            for task in tasks:
                if not task.cancelled():
                    task.result()
        finally:
            listener.cancel()
            self.tell()

    async def listen(self) -> None:
        """A signal or `control.json` stops the work."""
        while True:
            self.report.poll()
            if self.report.stop_requested:
                self.teacher.stopping.set()
            await asyncio.sleep(POLL_S)

    async def take(self, examples: Iterator[Example]) -> None:
        """One row after the other, until there are none or the work stops."""
        for example in examples:
            if self.teacher.stopping.is_set():
                return
            if not self.rows.is_done(example):
                try:
                    line = await self.augmented(example)
                    self.rows.add(line)
                except Stopping:
                    return
                except BudgetSpent as budget:
                    self.budget = budget
                    self.teacher.stopping.set()
                    return
                except LorasmithError as error:
                    self.stop(error)
                    return
                except BaseException:
                    self.teacher.stopping.set()  # the others end before `finish` raises this
                    raise
                self.note(line)
            self.done += self.rows.is_done(example)
            if time.monotonic() - self.reported_at > REPORT_EVERY_S:
                self.tell()

    def stop(self, error: LorasmithError) -> None:
        self.error = self.error or error
        self.teacher.stopping.set()

    def note(self, line: AugmentedRow) -> None:
        """Stop where one row after the other comes to nothing: the rest would too, and be asked about in vain."""
        if line.fate == "answered":
            self.in_a_row = dict.fromkeys(self.in_a_row, 0)
            return
        self.in_a_row[line.fate] += 1
        if self.in_a_row["failed"] >= HOPELESS_AFTER:
            got, hint = "no answer", "when the endpoint answers again"
        elif self.in_a_row["rejected"] >= USELESS_AFTER:
            got, hint = "an answer that cannot be used", "with the next rows"
        else:
            return
        self.stop(
            TeacherFailed(
                f"{self.in_a_row[line.fate]} rows after each other got {got}, the last one: {line.sentence}",
                hint=f"lorasmith data augment --resume JOB goes on, {hint}",
            )
        )

    def tell(self) -> None:
        self.reported_at = time.monotonic()
        ledger = self.teacher.ledger
        failed = self.rows.counts()["failed"]
        facts = f"{ledger.asked:,} requests, {ledger.tokens:,} tokens" + (f", {failed:,} failed" if failed else "")
        self.report("progress", condition=self.spec.method.value, done=self.done, total=self.total, facts=facts)

    async def augmented(self, example: Example) -> AugmentedRow:
        """Raises `Stopping`, `BudgetSpent` and `TeacherFailed`; what is wrong with this row alone is in its line."""
        requests: list[str] = []

        async def ask(step: str, messages: Messages) -> Texts:
            request = f"{example.id}/{prompts.version_of(self.spec.method)}/{step}"
            requests.append(request)
            n = 1 if step == "there" else self.spec.n
            return read_texts(await self.teacher.ask(request, messages), n, with_language=step == "there")

        try:
            texts = await self.texts(example, ask)
            line = line_of(example, self.spec, "answered", texts=texts)
        except BadAnswer as bad:
            line = line_of(example, self.spec, "rejected", reason=bad.reason, sentence=bad.sentence)
        except NoAnswer as none:
            reason: RowReason = "refused-by-endpoint" if none.reason == "refused" else "no-answer"
            line = line_of(example, self.spec, "failed", reason=reason, sentence=none.sentence)
        for request in requests if line.fate != "failed" else ():
            self.teacher.ledger.forget(request)
        return line

    async def texts(self, example: Example, ask: Ask) -> list[str]:
        """What the method makes of a row; `ask` takes the name of a step and its messages."""
        messages, n = example.messages or [], self.spec.n
        match self.spec.method:
            case AugmentationMethod.REPHRASE:
                prompt = prompts.rephrase(before_request(example), request_of(example), example.answer(), n)
            case AugmentationMethod.EXPAND:
                prompt = prompts.expand(messages[:-1], example.answer(), n)
            case AugmentationMethod.NEGATIVE:
                prompt = prompts.negative(messages[:-1], example.answer(), n)
            case AugmentationMethod.BACK_TRANSLATE:
                assert self.spec.language is not None
                there = await ask("there", prompts.translate_there(request_of(example), self.spec.language))
                if there.language is None or there.language == self.spec.language:
                    raise BadAnswer("unsuitable", f"the request is in {there.language} already, the language between")
                prompt = prompts.translate_back(there.texts[0], there.language, n)
        return (await ask("texts", prompt)).texts


def line_of(
    example: Example,
    spec: AugmentationSpec,
    fate: Literal["answered", "rejected", "failed", "skipped"],
    *,
    texts: list[str] | None = None,
    reason: RowReason | None = None,
    sentence: str | None = None,
) -> AugmentedRow:
    return AugmentedRow(
        row=example.row,
        example_id=example.id,
        fate=fate,
        texts=texts or [],
        reason=reason,
        sentence=sentence,
        prompt=prompts.version_of(spec.method),
    )
