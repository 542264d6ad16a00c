"""Exports of an adapter: merged into its base as a Hugging Face folder, or as one GGUF file."""

from __future__ import annotations

from pathlib import Path

from lorasmith.errors import Conflict
from lorasmith.files import new_id
from lorasmith.schemas.adapters import ExportInputs, ExportResult, ExportSpec
from lorasmith.schemas.jobs import Job, JobKind
from lorasmith.services.adapters import adapter_folder, verify_adapter
from lorasmith.services.in_use import USES
from lorasmith.services.jobs import Watch, create_job, run_in_foreground
from lorasmith.services.workbench import Workbench


def export_adapter(workbench: Workbench, spec: ExportSpec, watch: Watch) -> ExportResult:
    """Write `spec.output`, by default below `exports/` of the home folder. Raises `Conflict` when it exists."""
    job = create_export(workbench, spec, auto_resume=False)
    return ExportResult.model_validate(run_in_foreground(workbench, job, watch).result)


def queue_export(workbench: Workbench, spec: ExportSpec) -> Job:
    """Let a worker write it, into a folder of its own below `exports/`."""
    with USES:
        adapter = workbench.adapters.require(spec.adapter)
        target = f"exports/{new_id('export')}/{adapter.name}{suffix_of(spec)}"
        own_place = spec.model_copy(update={"adapter": adapter.id, "output": str(workbench.path(target))})
        return create_export(workbench, own_place, auto_resume=True)


def create_export(workbench: Workbench, spec: ExportSpec, *, auto_resume: bool) -> Job:
    adapter = verify_adapter(workbench, spec.adapter)
    output = (
        Path(spec.output).expanduser().resolve()
        if spec.output
        else workbench.path(f"exports/{adapter.name}{suffix_of(spec)}")
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
    return create_job(
        workbench,
        JobKind.EXPORT,
        f"{adapter.name} {spec.kind}",
        spec.model_dump(),
        inputs.model_dump(),
        auto_resume=auto_resume,
    )


def suffix_of(spec: ExportSpec) -> str:
    return f"-{spec.quantization}.gguf" if spec.kind == "gguf" else "-merged"
