"""Exports of an adapter: merged into its base as a Hugging Face folder, or as one GGUF file."""

from __future__ import annotations

from pathlib import Path

from lorasmith.errors import Conflict
from lorasmith.schemas.adapters import ExportInputs, ExportResult, ExportSpec
from lorasmith.schemas.jobs import JobKind
from lorasmith.services.adapters import adapter_folder, verify_adapter
from lorasmith.services.jobs import Watch, create_job, run_in_foreground
from lorasmith.services.workbench import Workbench


def export_adapter(workbench: Workbench, spec: ExportSpec, watch: Watch) -> ExportResult:
    """Write `spec.output`, by default below `exports/` of the home folder. Raises `Conflict` when it exists."""
    adapter = verify_adapter(workbench, spec.adapter)
    suffix = f"-{spec.quantization}.gguf" if spec.kind == "gguf" else "-merged"
    output = (
        Path(spec.output).expanduser().resolve() if spec.output else workbench.path(f"exports/{adapter.name}{suffix}")
    )
    if output.exists():
        raise Conflict(f"{output} exists already", hint="give another --output, or remove it first")
    output.parent.mkdir(parents=True, exist_ok=True)
    inputs = ExportInputs(
        model_folder=adapter.base_folder,
        model_name=adapter.base_model,
        adapter_folder=str(adapter_folder(workbench, adapter)),
        adapter_name=adapter.name,
        output=str(output),
    )
    job = create_job(
        workbench,
        JobKind.EXPORT,
        f"{adapter.name} {spec.kind}",
        spec.model_dump(),
        inputs.model_dump(),
        auto_resume=False,
    )
    return ExportResult.model_validate(run_in_foreground(workbench, job, watch).result)
