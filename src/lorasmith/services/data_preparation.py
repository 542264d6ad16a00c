"""`data prepare`: collected interactions to a folder with train, val and test in ChatML form, and its metadata."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.errors import Conflict, InvalidData, InvalidSpec, NotFound, did_you_mean
from lorasmith.files import MANIFEST, disk_errors, staged_folder, write_json
from lorasmith.schemas.data import PARTS, DataImportSpec, DataPreparationSpec, DatasetFormat, Example
from lorasmith.schemas.jobs import now
from lorasmith.services.data_conversion import DEFAULT_SYSTEM_PROMPT, SYSTEM_PROMPTS
from lorasmith.services.data_curation import CuratedData, curate
from lorasmith.services.data_files import digest_of
from lorasmith.services.data_import import import_dataset

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy

METADATA = "metadata.json"
OWN_FILES = {f"{part}.jsonl" for part in PARTS} | {METADATA, MANIFEST}


def prepare_folder(source: Path, output: Path, spec: DataPreparationSpec, *, force: bool = False) -> dict[str, Any]:
    """Write `output` as a whole and return its metadata: counts, shares, source, format and system prompts."""
    check_output(output, force)
    return write_folder(curate_conversations(source, spec), source, output, spec)


def prepare_and_import(
    workbench: Workbench, source: Path, output: Path, spec: DataImportSpec, *, force: bool = False
) -> dict[str, Any]:
    """Like `prepare_folder`, and the same examples as a dataset; its id and name stand in the returned metadata."""
    check_output(output, force)
    data = curate_conversations(source, spec)
    dataset = import_dataset(workbench, source, spec)
    metadata = write_folder(data, source, output, spec)
    return {**metadata, "dataset": {"id": dataset.id, "name": dataset.name}}


def curate_conversations(source: Path, spec: DataPreparationSpec) -> CuratedData:
    data = curate(source, spec)
    found = data.detection.format
    if found == DatasetFormat.COMPLETION or found.kind != "sft":
        what = "plain texts" if found.kind == "sft" else "preferences"
        raise InvalidData(
            f"{source} holds {what} (format {found}), expected conversations or collected interactions",
            hint=f"lorasmith data import {source} --name NAME takes {what} as they are",
        )
    return data


def prepare_domains(
    source: Path,
    output: Path,
    specs: Mapping[str, DataPreparationSpec],
    *,
    workbench: Workbench | None = None,
    force: bool = False,
) -> dict[str, dict[str, Any]]:
    """Like `prepare_folder`, for the file or folder of each domain in `source`: a folder for each in `output`, all or none.

    Where the specs are of imports, each domain is also stored as a dataset. Returns the metadata by domain.
    """
    if not source.is_dir():
        raise InvalidSpec(
            f"--domains needs a folder with a file or folder for each, got {source}",
            hint="put the files into one folder: financial.jsonl, legal.csv, …",
        )
    sources = {domain: source_of_domain(source, domain) for domain in specs}
    check_output(output, force, domains=set(specs))
    data = {domain: curate_conversations(sources[domain], spec) for domain, spec in specs.items()}
    metadata = {domain: describe_folder(data[domain], sources[domain], specs[domain]) for domain in specs}
    for domain, spec in specs.items():
        if workbench is not None and isinstance(spec, DataImportSpec):
            dataset = import_dataset(workbench, sources[domain], spec)
            metadata[domain]["dataset"] = {"id": dataset.id, "name": dataset.name}
    with staged_folder(output, replace=True) as staging:
        for domain in specs:
            (staging / domain).mkdir()
            write_files(staging / domain, data[domain], metadata[domain])
    return metadata


def source_of_domain(folder: Path, domain: str) -> Path:
    """`financial/` or `financial.jsonl`, whatever its extension."""
    found = sorted(path for path in folder.iterdir() if path.name.partition(".")[0] == domain and path.name != domain)
    if (folder / domain).is_dir():
        found.append(folder / domain)
    if not found:
        there = sorted({path.name.partition(".")[0] for path in folder.iterdir() if not path.name.startswith(".")})
        raise NotFound(
            f"{folder} holds no file or folder for the domain {domain!r}{did_you_mean(domain, there)}",
            hint=f"it holds: {', '.join(there[:12]) or 'nothing'}",
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise InvalidData(
            f"{folder} holds more than one source for the domain {domain!r}: {names}",
            hint="put them into a folder of that name, or take all but one away",
        )
    return found[0]


def write_folder(data: CuratedData, source: Path, output: Path, spec: DataPreparationSpec) -> dict[str, Any]:
    metadata = describe_folder(data, source, spec)
    with staged_folder(output, replace=True) as staging:
        write_files(staging, data, metadata)
    return metadata


def write_files(folder: Path, data: CuratedData, metadata: dict[str, Any]) -> None:
    for part in PARTS:
        write_conversations(folder / f"{part}.jsonl", data.parts[part])
    write_json(folder / METADATA, metadata)


def check_output(output: Path, force: bool, domains: Collection[str] = ()) -> None:
    """Refuse to replace what is not ours, and what is ours without `force`."""
    if not output.exists():
        return
    if not output.is_dir():
        raise Conflict(f"{output} is a file, expected a folder", hint="choose another --output")
    present = {path.name for path in output.iterdir()}
    ours = {domain for domain in domains if (output / domain).is_dir()}
    within = [
        f"{name}/{path.name}" for name in ours for path in (output / name).iterdir() if path.name not in OWN_FILES
    ]
    foreign = sorted([*(present - OWN_FILES - ours), *within])
    if foreign:
        raise Conflict(
            f"{output} holds {foreign[0]!r}, which `data prepare` did not write, expected an empty folder",
            hint="choose another --output; a folder with other files is never replaced",
        )
    if present and not force:
        raise Conflict(f"{output} is not empty", hint="choose another --output, or replace its files with --force")


def describe_folder(data: CuratedData, source: Path, spec: DataPreparationSpec) -> dict[str, Any]:
    """`metadata.json`."""
    sizes = data.part_sizes()
    total = sum(sizes.values())
    return {
        "total_examples": total,
        **{f"{part}_examples": sizes[part] for part in PARTS},
        "shares": {part: round(sizes[part] / total, 4) for part in PARTS},
        "split": dict(zip(PARTS, spec.split, strict=True)),
        "exact": spec.exact,
        "salt": spec.salt,
        "near_duplicates": spec.near_duplicates,
        "max_rows": spec.max_rows,
        "split_note": data.statistics.get("split_note"),
        "source": str(source),
        "source_sha256": digest_of(source),
        "source_rows": len(data.ledger),
        "fates": data.fates(),
        "rejected_rows": [line.model_dump(exclude_none=True) for line in data.ledger if line.fate == "rejected"],
        "format": data.detection.format,
        "format_reason": data.detection.reason,
        "system_prompts": system_prompts_of(data),
        "created_at": now().isoformat(),
    }


def system_prompts_of(data: CuratedData) -> dict[str, str]:
    """Agent role to system prompt, for the roles that occur; only collected interactions have roles."""
    if data.detection.format != DatasetFormat.INTERACTIONS:
        return {}
    used = {example.messages[0].content for example in data.examples if example.messages}
    table = {**SYSTEM_PROMPTS, "default": DEFAULT_SYSTEM_PROMPT}
    return {role: prompt for role, prompt in table.items() if prompt in used}


def write_conversations(path: Path, examples: Sequence[Example]) -> None:
    with disk_errors(path), path.open("w", encoding="utf-8", newline="\n") as handle:
        for example in examples:
            row = example.model_dump(include={"messages", "tools"}, exclude_none=True)
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")
