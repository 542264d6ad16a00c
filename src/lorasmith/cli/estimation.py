"""`lorasmith estimate`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import console_out, duration, hint, print_json, print_table, size
from lorasmith.cli.watching import JobView

if TYPE_CHECKING:
    from lorasmith.schemas.estimation import Estimate


def estimate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="starter, a folder, a hub id or a registered name")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", "-d", help="Name of a dataset, or a file")] = None,
    preset: Annotated[
        str | None, typer.Option(help="quick, balanced, high_quality, cpu, gpu-8gb, domain, tiny, or one of your own")
    ] = None,
    template: Annotated[str | None, typer.Option(help="Chat template for a model without one: chatml or plain")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="YAML file with the fields of a run")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Override a field, for example lora.rank=16; repeatable")
    ] = None,
    measure_s: Annotated[float, typer.Option(help="Seconds of measuring, at most 60")] = 20.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the estimate as JSON")] = False,
) -> None:
    """Predict memory, time and disk of a training run, and what would take less"""
    from lorasmith.services import estimation, training

    workbench = open_workbench(context)
    flags = {"model": model, "data": data, "preset": preset, "template": template}
    spec = training.build_spec(flags, config=config, assignments=assignments, home=workbench.home)
    with JobView("estimate") as view:
        found = estimation.estimate(workbench, spec, view, measuring_s=measure_s)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    show(found)


def show(found: Estimate) -> None:
    memory, clock, disk = found.memory, found.time, found.disk
    print_table(
        ["", "estimate", "from"],
        [
            ["peak memory", size(memory.peak_bytes), f"{size(memory.available_bytes)} are available"],
            *process_rows(found),
            ["  libraries, rows", size(memory.process_bytes + memory.libraries_bytes), "measured"],
            ["  weights", size(memory.weights_bytes + memory.packed_bytes), f"{found.precision}, {found.memory_mode}"],
            ["  adapter", size(memory.adapter_bytes + memory.saving_bytes), f"{found.trainable_parameters:,} trained"],
            ["  a step", size(memory.step_bytes + memory.reduction_bytes), found.computed_by],
            *time_rows(found),
            ["disk", size(disk.peak_bytes), f"{size(disk.free_bytes)} are free"],
            ["  a checkpoint", size(disk.checkpoint_bytes), f"{disk.checkpoints} are kept"],
            ["  adapter", size(disk.adapter_bytes), "in the job, and in the store"],
            ["  prefix cache", size(disk.prefix_cache_bytes), "in the job"],
            ["  token store", size(disk.token_store_bytes), "of the dataset, unless it is there"],
        ],
        title=f"{found.model} on {found.dataset}: {found.rows} rows, {found.tokens:,} tokens an epoch, {found.steps} steps",
    )
    out = console_out()
    if found.fits:
        out.print("It fits.")
    else:
        out.print(f"It does not fit: {found.why_not}.", markup=False)
        out.print(f"Way out: {found.way_out}", markup=False)
    if found.suggestions:
        print_table(
            ["--set", "peak memory", "time", "rows lost", ""],
            [
                [
                    " ".join(one.assignments),
                    change(memory.peak_bytes, one.peak_memory_bytes, size(one.peak_memory_bytes)),
                    change(clock.total_s, one.total_s, duration(one.total_s)) if clock and one.total_s else "",
                    one.rows_lost,
                    one.about,
                ]
                for one in found.suggestions
            ],
            title="What would take less",
        )
    if found.why_peft:
        hint(f"trains through PEFT, several times slower: {found.why_peft}")
    if found.why_no_time:
        hint(f"no time: {found.why_no_time}")
    hint(f"the formula of the workbench design, appendix B.2, says {size(found.seed_formula_bytes)}")


def process_rows(found: Estimate) -> list[list[str]]:
    """The peak of each process, where there are several; what follows in the table are the parts of the first."""
    peaks = found.memory.process_peaks_bytes
    if found.processes == 1 or not peaks:
        return []
    return [
        ["  a further process", size(peaks[-1]), f"one of {len(peaks) - 1}"],
        ["  the first process", size(peaks[0]), "of which"],
    ]


def time_rows(found: Estimate) -> list[list[str]]:
    clock = found.time
    if clock is None:
        return [["time", "", found.why_no_time or ""]]
    how = f"{clock.measured_layers} layers measured for {clock.measured_s:.0f} s, {clock.tokens_per_s:,.0f} tokens/s"
    return [
        ["time", duration(clock.total_s), f"{duration(clock.low_s)} to {duration(clock.high_s)}"],
        ["  start", duration(clock.start_s), "imports, tokenizing, loading"],
        ["  training", duration(clock.training_s), how],
        *([["  exchange", duration(clock.exchange_s), "of training"]] if found.processes > 1 else []),
        ["  validation", duration(clock.validation_s), ""],
        ["  saving", duration(clock.saving_s), ""],
    ]


def change(before: float, after: float, text: str) -> str:
    """`1.2 GB (-30 %)`"""
    return f"{text} ({100 * (after / before - 1):+.0f} %)"
