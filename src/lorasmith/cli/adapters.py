"""`lorasmith adapters` and `lorasmith export`"""

from __future__ import annotations

from typing import Annotated

import typer

from lorasmith.cli.context import open_workbench
from lorasmith.cli.output import hint, print_json, print_table, size
from lorasmith.cli.watching import JobView

app = typer.Typer(help="Trained adapters", no_args_is_help=True)
export_app = typer.Typer(help="Write an adapter for other programs", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON")]
Output = Annotated[
    str | None, typer.Option("--output", "-o", help="Where to write; default exports/ in the home folder")
]


@app.command("list")
def list_adapters(context: typer.Context, as_json: AsJson = False) -> None:
    """List the stored adapters"""
    from lorasmith.services import adapters

    found = adapters.list_adapters(open_workbench(context))
    if as_json:
        print_json([adapter.model_dump(mode="json") for adapter in found])
        return
    rows = []
    for adapter in found:
        loss = adapter.metrics.get("validation_loss")
        shown = "" if loss is None else f"{loss:.3f}"
        rows.append(
            [
                adapter.name,
                adapter.base_model,
                adapter.dataset,
                adapter.lora_config["rank"],
                shown,
                size(adapter.size_bytes),
            ]
        )
    print_table(["name", "base", "data", "rank", "validation loss", "size"], rows)


@app.command("show")
def show_adapter(context: typer.Context, name: str) -> None:
    """Show one adapter as JSON"""
    from lorasmith.services import adapters

    workbench = open_workbench(context)
    adapter = adapters.show_adapter(workbench, name)
    print_json({**adapter.model_dump(mode="json"), "folder": str(workbench.path(adapter.folder))})


@app.command("verify")
def verify_adapter(context: typer.Context, name: str) -> None:
    """Check an adapter's files against their checksums"""
    from lorasmith.services import adapters

    adapter = adapters.verify_adapter(open_workbench(context), name)
    print(f"adapter {adapter.name}: every file is as it was stored, sha256:{adapter.digest}")


@app.command("rm")
def remove_adapter(
    context: typer.Context, name: str, yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask")] = False
) -> None:
    """Remove an adapter and its files"""
    from lorasmith.services import adapters

    if not yes:
        typer.confirm(f"remove adapter {name} and its files?", abort=True, err=True)
    adapter = adapters.remove_adapter(open_workbench(context), name)
    print(f"removed adapter {adapter.name}")


@export_app.command("merged")
def export_merged(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Name of a stored adapter")],
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Write base and adapter merged, as a Hugging Face folder"""
    export(context, {"adapter": adapter, "kind": "merged", "output": output}, as_json)


@export_app.command("gguf")
def export_gguf(
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(help="Name of a stored adapter")],
    quantization: Annotated[str, typer.Option("--type", "-t", help="F16 or Q8_0")] = "F16",
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Write base and adapter merged, as one GGUF file for llama.cpp"""
    spec = {"adapter": adapter, "kind": "gguf", "quantization": quantization.upper(), "output": output}
    export(context, spec, as_json)


def export(context: typer.Context, values: dict[str, str | None], as_json: bool) -> None:
    from lorasmith.schemas.adapters import ExportSpec
    from lorasmith.services.adapters_export import export_adapter
    from lorasmith.services.specs import parse_spec

    spec = parse_spec(ExportSpec, values)
    with JobView("export") as view:
        result = export_adapter(open_workbench(context), spec, view)
    if as_json:
        print_json(result.model_dump(mode="json"))
        return
    print(f"{result.path} ({size(result.size_bytes)})")
    for check, value in result.checks.items():
        hint(f"  {check}: {value}")
