"""`lorasmith demo`"""

from __future__ import annotations

import time

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.evaluation import show_evaluation
from lorasmith.cli.output import console_out, duration, size
from lorasmith.cli.watching import JobView


def demo(context: typer.Context) -> None:
    """Run the main job end to end, offline: import, train, evaluate, export, answer"""
    from rich.markup import escape

    from lorasmith.services.demo import DATASET, MODEL, run_demo

    began = time.perf_counter()
    workbench = open_workbench(context)
    out = console_out()
    out.print(
        f"The model {MODEL} learns to describe Python function headers as JSON (dataset {DATASET}).", markup=False
    )
    shown = run_demo(workbench, JobView)
    out.print()
    show_evaluation(workbench, shown.evaluation)
    out.print("\n[bold]One header that neither model has seen[/bold]")
    out.print(escape(shown.example.prompt_messages()[-1].content))
    for name, text in shown.answers.items():
        out.print(f"\n[bold]{escape(name)}[/bold]\n{escape(text.strip())}")
    out.print(f"\n[bold]the right answer[/bold]\n{escape(shown.example.answer())}")
    out.print("\n[bold]Files[/bold]")
    files = {
        "adapter (PEFT)": shown.adapter_folder,
        "loss plot": shown.adapter_folder / "loss.png",
        "report": shown.report,
        f"GGUF, {size(shown.export.size_bytes)}": shown.export.path,
    }
    for label, path in files.items():
        out.print(f"  {label:<16} {path}", markup=False, soft_wrap=True)
    home = f"--home {workbench.home} "
    out.print("\n[bold]Next[/bold]")
    out.print(f"  lorasmith {home}chat {shown.adapter.name}", markup=False, soft_wrap=True)
    out.print(f"  lorasmith {home}train --model {MODEL} --data YOUR.jsonl --preset tiny", markup=False, soft_wrap=True)
    out.print(f"\nDone in {duration(time.perf_counter() - began)}.")
