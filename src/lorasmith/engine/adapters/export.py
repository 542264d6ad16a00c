"""The export job: a merged Hugging Face folder or a GGUF file, each compared with base + adapter once it is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasmith.engine.adapters.gguf import new_file, read_back, read_proof, write_gguf, write_proof
from lorasmith.engine.adapters.gguf_tensors import architecture, embedding_rows
from lorasmith.engine.adapters.gguf_vocabulary import read_vocabulary
from lorasmith.engine.adapters.merging import attach, fold, stored_dtype
from lorasmith.engine.adapters.proof import compare_logits, probe_logits, probe_prompts, require
from lorasmith.engine.models.loading import (
    base_fingerprint,
    check_base,
    load_model,
    load_tokenizer,
    model_folder,
    other_precision,
)
from lorasmith.engine.reporting import Reporter
from lorasmith.errors import Conflict, Interrupted
from lorasmith.faults import fault_point
from lorasmith.files import folder_size_bytes, read_json, staged_folder, verify_manifest, write_json
from lorasmith.model_files import check_model_folder
from lorasmith.schemas.adapters import ExportInputs, ExportResult, ExportSpec
from lorasmith.schemas.jobs import JobOrder

# Allowed differences of logits from base + adapter, in standard deviations of the logits
MERGE_BOUND = 1e-3  # float32 sums in another order
ROUNDING_BOUNDS = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}
DESCRIPTION = "export.json"  # in a merged folder
GGUF_BOUNDS = {"F16": 0.05, "Q8_0": 0.5}


@dataclass(frozen=True)
class Merged:
    """A merged float32 model, what base + adapter answered before, and the checks so far."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    reference: Tensor  # (positions, V)
    checks: dict[str, Any]


def run(order: JobOrder, folder: Path, report: Reporter) -> ExportResult:
    """Write what the order asks for at `inputs.output`; nothing is there unless its proof holds."""
    spec = ExportSpec.model_validate(order.spec)
    inputs = ExportInputs.model_validate(order.inputs)
    inputs.model_folder = str(model_folder(inputs.model_folder))
    check_base(Path(inputs.adapter_folder), Path(inputs.model_folder))
    output = Path(inputs.output)
    if output.exists():
        checks = own_checks(order.id, output)
        if checks is None:
            raise Conflict(f"{output} exists already", hint="choose another place, or remove it first")
        report("note", text=f"{output} was whole when the process before this one ended")
    elif spec.kind == "merged":
        checks = export_merged(order.id, inputs, report)
    else:
        checks = export_gguf(order.id, inputs, spec, report)
    return ExportResult(
        kind=spec.kind,
        path=str(output),
        size_bytes=folder_size_bytes(output) if output.is_dir() else output.stat().st_size,
        quantization=spec.quantization if spec.kind == "gguf" else None,
        checks=checks,
    )


def own_checks(job_id: str, output: Path) -> dict[str, Any] | None:
    """The checks of what this job wrote there before its process was killed; None for what is another's."""
    if output.is_dir():
        written = read_json(output / DESCRIPTION) if (output / DESCRIPTION).is_file() else None
    else:
        written = read_proof(output)
    if not isinstance(written, dict) or written.get("job") != job_id:
        return None
    if output.is_dir():
        verify_manifest(output)
    checks: dict[str, Any] = written["checks"]
    return checks


def export_merged(job_id: str, inputs: ExportInputs, report: Reporter) -> dict[str, Any]:
    """A Hugging Face folder in the dtype of the base, with `export.json` beside the weights."""
    output = Path(inputs.output)
    check_model_folder(Path(inputs.model_folder))
    dtype = stored_dtype(Path(inputs.model_folder))
    merged = merge_with_reference(inputs, report)
    fault_point("export.merged")
    with staged_folder(output, point="export") as staging:
        start_phase(report, "write")
        merged.model.to(dtype)  # type: ignore[arg-type]  # transformers wraps the method
        merged.model.save_pretrained(staging)
        merged.tokenizer.save_pretrained(staging)
        start_phase(report, "verify")
        difference = compare_logits(merged.reference, probe_logits(load_model(staging), merged.prompts))
        bound = ROUNDING_BOUNDS[dtype]
        require(difference, bound, "the written folder")
        checks = {**merged.checks, "artefact": difference.as_check(bound), "dtype": str(dtype).removeprefix("torch.")}
        fault_point("export.proved")
        write_json(staging / DESCRIPTION, description(job_id, inputs, checks))
    return checks


def export_gguf(job_id: str, inputs: ExportInputs, spec: ExportSpec, report: Reporter) -> dict[str, Any]:
    """One GGUF file; its proof is inside, under the key `lorasmith.export_proof`."""
    output = Path(inputs.output)
    check_model_folder(Path(inputs.model_folder))
    stored_dtype(Path(inputs.model_folder))
    merged = merge_with_reference(inputs, report, gguf=True)
    vocabulary = read_vocabulary(merged.tokenizer, embedding_rows(merged.model))
    with new_file(output) as temporary:
        start_phase(report, "write")
        write_gguf(
            temporary,
            merged.model,
            vocabulary,
            spec.quantization,
            name=f"{inputs.model_name} {inputs.adapter_name}",
            license=model_license(Path(inputs.model_folder)),
        )
        start_phase(report, "verify")
        stored = read_back(temporary, merged.model, vocabulary)
        difference = compare_logits(merged.reference, probe_logits(merged.model, merged.prompts))
        bound = GGUF_BOUNDS[spec.quantization]
        require(difference, bound, "the written GGUF")
        checks = {**merged.checks, "artefact": difference.as_check(bound), "read_back": stored}
        if vocabulary.notes:
            checks["notes"] = [*checks.get("notes", []), *vocabulary.notes]
        write_proof(temporary, description(job_id, inputs, checks))
    return checks


def merge_with_reference(inputs: ExportInputs, report: Reporter, *, gguf: bool = False) -> Merged:
    """Base + adapter on the probe prompts, then merged, which must answer the same."""
    start_phase(report, "load")
    adapter_folder = Path(inputs.adapter_folder)
    model = load_model(Path(inputs.model_folder))
    tokenizer = serving_tokenizer(Path(inputs.model_folder), adapter_folder)
    if gguf:  # before the long work
        architecture(model)
        read_vocabulary(tokenizer, embedding_rows(model))
    start_phase(report, "reference")
    wrapped = attach(model, adapter_folder)
    prompts = probe_prompts(tokenizer, embedding_rows(model))
    reference = probe_logits(wrapped, prompts)
    with wrapped.disable_adapter():
        effect = compare_logits(reference, probe_logits(wrapped, prompts))
    start_phase(report, "merge")
    merged = fold(wrapped)
    difference = compare_logits(reference, probe_logits(merged, prompts))
    require(difference, MERGE_BOUND, "the merged model")
    checks: dict[str, Any] = {"adapter_effect": effect.relative, "merge": difference.as_check(MERGE_BOUND)}
    caveat = other_precision(adapter_folder, None)
    if caveat:
        report("warning", text=caveat)
        checks["notes"] = [caveat]
    return Merged(merged, tokenizer, prompts, reference, checks)


def start_phase(report: Reporter, name: str) -> None:
    if report.stop_requested:
        raise Interrupted(f"stopped before the phase {name!r} of the export; nothing was written")
    report("phase", name=name)


def serving_tokenizer(model_folder: Path, adapter_folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer and chat template that the adapter was trained with; the base's where it brings none."""
    own = (adapter_folder / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(adapter_folder if own else model_folder)
    template = adapter_folder / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def description(job_id: str, inputs: ExportInputs, checks: dict[str, Any]) -> dict[str, Any]:
    """What was exported from what, by which job, and how it compares."""
    return {
        "job": job_id,
        "base_model": inputs.model_name,
        "base_fingerprint": base_fingerprint(Path(inputs.model_folder)),
        "adapter": inputs.adapter_name,
        "checks": checks,
    }


def model_license(folder: Path) -> str | None:
    """The `license` in the front matter of the model card, if there is one."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    parts = card.read_text(encoding="utf-8").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return None
    try:
        matter = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return None  # a card is prose; a damaged one does not stop an export
    license = matter.get("license") if isinstance(matter, dict) else None
    return license if isinstance(license, str) else None
