"""Evaluation of an adapter against its base, or of a base alone, on a part of a dataset."""

from __future__ import annotations

from lorasmith.errors import InvalidData, InvalidSpec
from lorasmith.schemas.evaluation import Evaluation, EvaluationInputs, EvaluationSpec
from lorasmith.schemas.jobs import JobKind
from lorasmith.services.adapters import adapter_folder, verify_adapter
from lorasmith.services.data_sources import find_dataset
from lorasmith.services.jobs import Watch, create_job, run_in_foreground
from lorasmith.services.models import ResolvedModel, resolve_model
from lorasmith.services.workbench import Workbench


def evaluate(workbench: Workbench, spec: EvaluationSpec, watch: Watch) -> Evaluation:
    """Run an evaluation job in the foreground and return the stored evaluation."""
    if (spec.adapter is None) == (spec.model is None):
        raise InvalidSpec("give an adapter, which is compared with its base, or --model for a base alone")
    dataset = find_dataset(workbench, spec.data)
    if not dataset.part_sizes.get(spec.part):
        parts = ", ".join(f"{part} {size}" for part, size in dataset.part_sizes.items())
        raise InvalidData(f"dataset {dataset.name!r} has no {spec.part} part", hint=f"it has: {parts}")
    adapter = verify_adapter(workbench, spec.adapter) if spec.adapter else None
    if adapter:
        model = ResolvedModel(adapter.base_model, adapter.base_folder)
    else:
        model = resolve_model(workbench, spec.model or "")
    job_of_adapter = workbench.jobs.get(adapter.training_job_id) if adapter and adapter.training_job_id else None
    folder = workbench.path(dataset.folder)
    inputs = EvaluationInputs(
        model_name=model.name,
        model_folder=model.location,
        adapter_name=adapter.name if adapter else None,
        adapter_folder=str(adapter_folder(workbench, adapter)) if adapter else None,
        dataset_name=dataset.name,
        dataset_id=dataset.id,
        dataset_sha256=dataset.sha256,
        examples_file=str(folder / f"{spec.part}.jsonl"),
        shots_file=str(folder / "train.jsonl") if spec.part != "train" else None,
        training_events=str(workbench.path(job_of_adapter.folder) / "events.jsonl") if job_of_adapter else None,
    )
    name = f"{adapter.name if adapter else model.name} on {dataset.name}"
    job = create_job(workbench, JobKind.EVALUATION, name, spec.model_dump(), inputs.model_dump(), auto_resume=False)
    finished = run_in_foreground(workbench, job, watch)
    return workbench.evaluations.require(Evaluation.model_validate(finished.result).id)
