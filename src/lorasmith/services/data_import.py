"""A source to a dataset of a workbench: in bounded memory, whole or absent, and continued where it was broken off."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.errors import Conflict, DiskFull, Interrupted, InvalidSpec, LorasmithError
from lorasmith.faults import fault_point
from lorasmith.files import (
    STAGING_PREFIX,
    disk_errors,
    new_id,
    own_folder,
    sha256_bytes,
    staged_folder,
    sweep,
    write_text,
)
from lorasmith.model_files import read_facts
from lorasmith.schemas.data import DataImportSpec, Dataset
from lorasmith.schemas.data_lineage import DataStep, StepInput
from lorasmith.services.data_checks import ContextCheck, open_tokenizer
from lorasmith.services.data_curation import Curation
from lorasmith.services.data_decision import fate_counts
from lorasmith.services.data_index import Busy
from lorasmith.services.data_parts import content_digest, index_of_rows
from lorasmith.services.data_progress import Report, silent
from lorasmith.services.data_reading import Source
from lorasmith.services.data_versions import DESCRIPTION, recorded_step, versions_of
from lorasmith.services.models import resolve_model

if TYPE_CHECKING:
    from lorasmith.services.workbench import Workbench  # it imports SQLAlchemy

DATASET_ID = "dataset_id"  # in the working folder
GOES_ON = "the same command goes on where this one stopped"
READS = ("import", "augment")  # steps whose rows come from a source
WAIT_S, LOOK_S = 1.0, 0.05  # for another import of the name, and between two looks whether it has ended


@dataclass(frozen=True)
class Origin:
    """Of a source that another stage wrote: the steps before it, and what its own one is called, asked and read."""

    before: list[DataStep]
    operation: str
    spec: dict[str, Any]
    inputs: list[StepInput]


def import_dataset(
    workbench: Workbench,
    path: Path,
    spec: DataImportSpec,
    report: Report = silent,
    *,
    dataset_id: str | None = None,
    description: str | None = None,
    origin: Origin | None = None,
) -> Dataset:
    """The dataset of a source. The same source under the same name and spec gives the dataset that is there already.

    `dataset_id` is the id that somebody was told before the import began; `origin` says who wrote the source.
    Ctrl-C raises `Interrupted`, a full disk `DiskFull`, and what was read is left under a hidden name, as after a crash:
    the same call goes on from there.
    """
    source = Source.open(path, spec.encoding)
    source_sha256 = source.digest()
    datasets = workbench.path("datasets")
    sweep(datasets)
    folder = work_place(datasets, spec.name)
    with only_import(folder):
        versions = versions_of(workbench, spec.name)
        if versions:
            same = same_or_conflict(versions, path, source_sha256, spec)
            shutil.rmtree(folder, ignore_errors=True)  # of an import that ended behind its row
            return same
        context = open_context(workbench, spec.tokenizer) if spec.tokenizer else None
        key = sha256_bytes(f"{source_sha256}\0{spec.model_dump_json()}".encode())
        with work_folder(folder, spec.name), Curation(folder, source, spec, context=context, key=key) as work:
            fault_point("import.opened")
            work.read(report)
            dataset_id = dataset_id or kept_id(folder)
            return store(workbench, work, source_sha256, spec, report, dataset_id, description, origin)


def store(
    workbench: Workbench,
    work: Curation,
    source_sha256: str,
    spec: DataImportSpec,
    report: Report,
    dataset_id: str,
    description: str | None,
    origin: Origin | None,
) -> Dataset:
    folder = workbench.path(f"datasets/{dataset_id}")
    with staged_folder(
        folder, replace=True, point="dataset"
    ) as staging:  # a crash before the row left a folder with this id
        statistics = work.write(staging, report)
        fault_point("import.decided")
        sha256 = content_digest(staging)
        read = StepInput(kind="source", name=source_name(work.source.path), sha256=source_sha256)
        dataset = Dataset(
            id=dataset_id,
            name=spec.name,
            description=description,
            format=work.detection.format,
            format_reason=work.detection.reason,
            kind=work.detection.format.kind,
            source=read.name,
            source_sha256=source_sha256,
            spec=spec,
            sha256=sha256,
            lineage=steps_to(sha256, spec, read, origin),
            read_in=dataset_id,
            folder=f"datasets/{dataset_id}",
            num_examples=sum(work.part_sizes.values()),
            part_sizes=work.part_sizes,
            fates=fate_counts(work.fates),
            statistics=statistics,
        )
        (staging / DESCRIPTION).write_text(dataset.model_dump_json(indent=2) + "\n", encoding="utf-8")
        fault_point("import.described")
    if work.search_index.exists():  # deciding again hashes nothing
        index = index_of_rows(folder)
        index.parent.mkdir()
        work.search_index.rename(index)
    try:
        return workbench.datasets.add(dataset)
    except BaseException:  # a folder without its row would never be found again
        shutil.rmtree(folder)
        raise


def steps_to(sha256: str, spec: DataImportSpec, read: StepInput, origin: Origin | None) -> list[DataStep]:
    asked = spec.model_dump(mode="json")
    if origin is None:
        return [recorded_step("import", asked, [read], sha256)]
    own = recorded_step(origin.operation, {**origin.spec, "imported": asked}, origin.inputs, sha256)
    return [*origin.before, own]


def source_name(path: Path) -> str:
    """Absolute for what is on this machine, as it stands for what is on the hub."""
    return str(path.resolve()) if path.exists() else str(path)


@contextmanager
def only_import(folder: Path) -> Iterator[None]:
    """Lock a working folder, made now if there is none. Raises `Busy` where another process or thread has it for `WAIT_S`.

    Whoever waits for its end must not go on in it while it is removed.
    """
    ends = time.monotonic() + WAIT_S
    while True:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        lock = own_folder(folder)
        if lock is not None:
            break
        if time.monotonic() >= ends:
            raise Busy("another process is importing under this name", hint="wait for it, or stop it")
        time.sleep(LOOK_S)
    try:
        yield
    finally:
        with suppress(OSError):  # removed, or what was read stays there
            folder.rmdir()
        os.close(lock)


@contextmanager
def work_folder(folder: Path, name: str) -> Iterator[None]:
    """What is done in the working folder of the import of that name. The end and an error of what was asked for remove it.

    Whatever else ends it (Ctrl-C, a full disk, a signal, a crash) leaves it, and the same import goes on there.
    """
    try:
        with disk_errors(folder):
            yield
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; no dataset {name!r} was made", hint=GOES_ON) from None
    except DiskFull as error:
        raise DiskFull(error.message, hint=f"{error.hint}; {GOES_ON}") from error
    except Busy:
        raise
    except LorasmithError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    fault_point("import.stored")
    shutil.rmtree(folder, ignore_errors=True)  # the next import of the name takes what may be left


def work_place(datasets: Path, name: str) -> Path:
    return datasets / f"{STAGING_PREFIX}import-{name}"


def kept_id(work: Path) -> str:
    """The id of the dataset that is made in this working folder: a crash before its row does not leave a folder of another id."""
    path = work / DATASET_ID
    if not path.exists():
        write_text(path, new_id("dataset"))
    return path.read_text(encoding="utf-8")


def open_context(workbench: Workbench, model: str) -> ContextCheck:
    folder = Path(resolve_model(workbench, model).location)
    if not folder.is_dir():
        raise InvalidSpec(f"--tokenizer needs a model on this machine, got {model!r}", hint="name its folder")
    context = read_facts(folder).context_tokens
    if not context:
        raise InvalidSpec(f"the config of {folder} does not say how many tokens its context has", hint="another model")
    return open_tokenizer(folder, context)


def same_or_conflict(versions: list[Dataset], source: Path, source_sha256: str, spec: DataImportSpec) -> Dataset:
    """The version that this import made, also where the name has gone on to others that were derived from it."""
    imported = [one for one in versions if one.lineage and one.lineage[-1].operation in READS]
    same = next((one for one in imported if one.source_sha256 == source_sha256 and one.spec == spec), None)
    if same is not None:
        return same
    if all(one.source_sha256 != source_sha256 for one in versions):
        difference = f"it was made from other content than {source} has"
    else:
        difference = f"it was made from {source} with other options"
    raise Conflict(
        f"there is already a dataset {spec.name!r}, and {difference}",
        hint=f"choose another --name, or remove it first: lorasmith data rm {spec.name} --yes",
    )
