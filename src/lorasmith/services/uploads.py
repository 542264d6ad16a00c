"""Files that come over the network: begun, filled, finished, imported. Each is a folder, which a restarted server reads."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from lorasmith.errors import Busy, Conflict, DiskFull, Interrupted, InvalidData, InvalidSpec, LorasmithError, NotFound
from lorasmith.files import (
    STAGING_PREFIX,
    existing_parent,
    new_id,
    read_json_if_there,
    remove_folder,
    sha256_file,
    sweep,
    write_bytes,
    write_json,
)
from lorasmith.schemas.data import DataImportSpec, Dataset
from lorasmith.schemas.jobs import now
from lorasmith.schemas.uploads import DatasetStatus, Upload
from lorasmith.services.data_files import OTHER_FORMATS, SUPPORTED, SUPPORTED_TEXT, inner_extension
from lorasmith.services.data_import import import_dataset, only_import, work_place
from lorasmith.services.data_index import Busy as BusyImport
from lorasmith.services.data_progress import Progress
from lorasmith.services.names import check_model_name
from lorasmith.services.workbench import Workbench

UPLOADS, STATE, DONE = "uploads", "upload.json", "imported.json"
KEPT_FREE_BYTES = 100 * 1024**2  # for rows and logs, whatever is uploaded
RESERVE, RESERVE_BYTES = "reserve", 16 * 1024  # what a full disk leaves to write down why an import waits
LONGEST_FILE_NAME = 255  # characters that are kept of what the sender calls it
STALE_AFTER = timedelta(days=7)
PASSES = (Busy, BusyImport, DiskFull)  # the same import may go well later
AT_FAULT = (InvalidData, InvalidSpec, Conflict)  # the file, its options or its name: it is not kept
UNKNOWN = (
    "the import met an error that lorasmith does not know, which the server's log has; it is tried again when the server "
    "is started again"
)
NAMES = threading.Lock()  # two uploads at once do not take one name
REMOVING = threading.Lock()  # an upload is not removed while its import begins


def begin_upload(
    workbench: Workbench, file_name: str, size_bytes: int | None, spec: DataImportSpec, description: str | None = None
) -> Upload:
    """An empty upload. Raises for a name that is taken, a kind of file that cannot be read, and a disk without room."""
    shown = shown_name(file_name)
    upload = Upload(
        id=new_id("dataset"),
        file_name=shown,
        extension=known_extension(shown),
        size_bytes=size_bytes,
        description=description,
        spec=spec,
    )
    if spec.tokenizer is not None:
        check_model_name(workbench, spec.tokenizer)
    check_room(workbench, size_bytes or 0)
    with NAMES:
        check_name_is_free(workbench, spec.name)
        workbench.path(upload.folder).mkdir(parents=True)
        save(workbench, upload)
    keep_reserve(workbench, upload)
    workbench.path(upload.content).touch()
    return upload


def accept_file(
    workbench: Workbench, file_name: str, spec: DataImportSpec, incoming: Path, description: str | None
) -> Upload:
    """A received file as an upload that waits for its import."""
    upload = begin_upload(workbench, file_name, None, spec, description)
    try:
        incoming.replace(workbench.path(upload.content))
        return finish_upload(workbench, upload)
    except BaseException:
        remove_upload(workbench, upload)
        raise


def shown_name(file_name: str) -> str:
    """The last part of what the sender calls the file, without characters that change how a text is shown."""
    name = file_name.replace("\\", "/").rpartition("/")[2]
    name = "".join(character if character.isprintable() else "�" for character in name)
    return name[-LONGEST_FILE_NAME:]  # its end has the extension


def known_extension(file_name: str) -> str:
    path = Path(file_name)
    extension = inner_extension(path)
    if extension not in SUPPORTED:
        way_out = OTHER_FORMATS.get(extension, "convert it, or give it the extension of what it holds")
        raise InvalidData(f"{file_name!r} has the extension {extension!r}, expected {SUPPORTED_TEXT}", hint=way_out)
    return extension if path.suffix.lower() == extension else extension + path.suffix.lower()


def check_room(workbench: Workbench, size_bytes: int) -> None:
    free = shutil.disk_usage(existing_parent(workbench.home)).free
    if size_bytes + KEPT_FREE_BYTES > free:
        raise DiskFull(f"{size_bytes} bytes do not fit: {free / 1e6:.0f} MB are free", hint="free some space first")


def check_name_is_free(workbench: Workbench, name: str, but: str | None = None) -> None:
    """Raise `Conflict` where a dataset or an upload other than `but` has the name."""
    stored = workbench.datasets.get(name)
    others = [stored.id] if stored is not None else []
    others += [upload.id for upload in list_uploads(workbench) if upload.spec.name == name]
    taken = [other for other in others if other != but]
    if taken:
        raise Conflict(
            f"there is already a dataset named {name!r}", hint=f"choose another name, or remove {taken[0]} first"
        )


def save(workbench: Workbench, upload: Upload) -> Upload:
    upload.updated_at = now()
    write_json(workbench.path(upload.folder) / STATE, upload.model_dump(mode="json"))
    return upload


def keep_reserve(workbench: Workbench, upload: Upload) -> None:
    write_bytes(workbench.path(upload.folder) / RESERVE, bytes(RESERVE_BYTES))


def save_outcome(workbench: Workbench, upload: Upload, status: DatasetStatus, problem: str | None = None) -> None:
    (workbench.path(upload.folder) / RESERVE).unlink(missing_ok=True)
    upload.status, upload.problem = status, problem
    save(workbench, upload)


def list_uploads(workbench: Workbench) -> list[Upload]:
    """Those of which no dataset has come yet."""
    found = sorted(workbench.path(UPLOADS).glob(f"dataset_*/{STATE}"))
    return [upload for path in found if (upload := read_upload(path)) is not None]


def all_uploads(workbench: Workbench) -> list[Upload]:
    """Those that a dataset has come of, too."""
    folders = workbench.path(UPLOADS).glob("dataset_*")
    found = [find_upload(workbench, folder.name) for folder in sorted(folders)]
    return [upload for upload in found if upload is not None]


def find_upload(workbench: Workbench, upload_id: str) -> Upload | None:
    if not upload_id.startswith("dataset_") or not upload_id.removeprefix("dataset_").isalnum():
        return None
    folder = workbench.path(UPLOADS) / upload_id
    return read_upload(folder / STATE) or read_upload(folder / DONE)  # in the order in which the file gets its names


def read_upload(path: Path) -> Upload | None:
    found = read_json_if_there(path)
    return None if found is None else Upload.model_validate(found)


def require_upload(workbench: Workbench, upload_id: str) -> Upload:
    upload = find_upload(workbench, upload_id)
    if upload is None:
        raise NotFound(f"no upload {upload_id!r}", hint="POST /api/v1/finetune/uploads begins one")
    return upload


def received_bytes(workbench: Workbench, upload: Upload) -> int:
    """0 also for content that was at fault, or is removed meanwhile."""
    try:
        return workbench.path(upload.content).stat().st_size
    except FileNotFoundError:
        return 0


def cut_back(workbench: Workbench, upload: Upload, size_bytes: int) -> None:
    """Forget what came behind that length."""
    os.truncate(workbench.path(upload.content), size_bytes)


def finish_upload(workbench: Workbench, upload: Upload, sha256: str | None = None) -> Upload:
    """All bytes are there. Raises `Conflict` when they are not, `InvalidData` when they are others than announced."""
    if upload.status is not DatasetStatus.UPLOADING:
        raise Conflict(f"the upload {upload.id} is {upload.status} already")
    received = received_bytes(workbench, upload)
    if upload.size_bytes is not None and received != upload.size_bytes:
        raise Conflict(
            f"{received} of {upload.size_bytes} bytes are here", hint=f"send the rest from Upload-Offset {received} on"
        )
    if received == 0:
        raise InvalidData(f"{upload.file_name!r} is empty, expected at least one row")
    upload.sha256 = sha256_file(workbench.path(upload.content))
    if sha256 is not None and sha256.lower() != upload.sha256:
        raise InvalidData(
            f"the bytes that came have sha256 {upload.sha256}, not {sha256}", hint="delete the upload and send it again"
        )
    upload.status = DatasetStatus.PROCESSING
    return save(workbench, upload)


def import_upload(workbench: Workbench, upload: Upload, is_stopping: Callable[[], bool]) -> Dataset | None:
    """The dataset, or None where it could not be made, which `upload.problem` says. Only a file at fault is removed then.

    Raises one of `PASSES` where it waits for room or for another process, and `Interrupted` when `is_stopping` became
    true: the same call goes on from there.
    """
    path = workbench.path(upload.content)

    def report(progress: Progress) -> None:
        if is_stopping():
            raise KeyboardInterrupt  # what Ctrl-C does to `data import`: all that was read stays

    if not take_up(workbench, upload):
        return None
    try:
        dataset = import_dataset(
            workbench, path, upload.spec, report, dataset_id=upload.id, description=upload.description
        )
        if dataset.id != upload.id:
            raise Conflict(f"there is already a dataset {upload.spec.name!r} of the same content: {dataset.id}")
    except Interrupted:
        raise
    except PASSES as error:
        save_outcome(workbench, upload, DatasetStatus.PROCESSING, f"it is tried again: {said(error, upload, path)}")
        raise
    except LorasmithError as error:
        save_outcome(workbench, upload, DatasetStatus.ERROR, said(error, upload, path))
        if isinstance(error, AT_FAULT):
            path.unlink(missing_ok=True)
        return None
    except Exception:
        save_outcome(workbench, upload, DatasetStatus.ERROR, UNKNOWN)
        raise
    try:
        save_outcome(workbench, upload, DatasetStatus.READY)
        state = workbench.path(upload.folder) / STATE
        state.replace(state.with_name(DONE))  # lists do not read it any more
    except FileNotFoundError:  # the dataset had its row, and was removed
        if workbench.path(upload.folder).exists():
            raise
    return dataset


def take_up(workbench: Workbench, upload: Upload) -> bool:
    """Let nobody remove it until its import has ended; False where it is gone already."""
    with REMOVING:
        if find_upload(workbench, upload.id) is None:
            return False
        if upload.problem is not None:  # of the last try, which has used the reserve
            keep_reserve(workbench, upload)
            upload.status, upload.problem = DatasetStatus.PROCESSING, None
            save(workbench, upload)
    return True


def said(error: LorasmithError, upload: Upload, path: Path) -> str:
    text = error.message.replace(str(path), upload.file_name)
    return f"{text} ({error.hint})" if error.hint else text


def left_to_import(workbench: Workbench) -> list[Upload]:
    """What an earlier server was importing, and what it could not import though nothing was wrong with the file."""
    found = list_uploads(workbench)
    kept = [one for one in found if one.status is DatasetStatus.ERROR and workbench.path(one.content).exists()]
    return [one for one in found if one.status is DatasetStatus.PROCESSING] + kept


def remove_stale_uploads(workbench: Workbench) -> None:
    """Remove what has been begun and not gone on with for `STALE_AFTER`, and what a killed server was receiving."""
    sweep(workbench.path(UPLOADS))
    for left in workbench.path(UPLOADS).glob(f"{STAGING_PREFIX}incoming_*"):
        left.unlink(missing_ok=True)
    for upload in list_uploads(workbench):
        content = workbench.path(upload.content)
        changed = datetime.fromtimestamp(content.stat().st_mtime, UTC) if content.exists() else upload.updated_at
        if upload.status is DatasetStatus.UPLOADING and now() - changed > STALE_AFTER:
            remove_upload(workbench, upload)


def remove_upload(workbench: Workbench, upload: Upload) -> None:
    """Raises `Conflict` while it is imported; one that waits to be tried again goes, with what was read of it."""
    with REMOVING:
        present = find_upload(workbench, upload.id) or upload
        imported = present.status is DatasetStatus.PROCESSING and present.problem is None
        if imported or workbench.datasets.get(upload.id) is not None:  # which it has become since the caller looked
            raise Conflict(
                f"the dataset {upload.spec.name!r} is being imported", hint="wait until it is ready or an error"
            )
        if present.problem is not None:
            remove_what_was_read(work_place(workbench.path("datasets"), upload.spec.name))
        remove_folder(workbench.path(upload.folder))


def remove_what_was_read(folder: Path) -> None:
    """Not where another process imports under that name."""
    if folder.exists():
        with suppress(BusyImport), only_import(folder):
            shutil.rmtree(folder, ignore_errors=True)
