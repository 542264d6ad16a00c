"""Files that are whole or absent: atomic writes, staged folders with a manifest, digests.

A reader sees a file or folder only after its bytes are on the disk; a crash leaves a `.staging-…` folder or a
`.tmp` file, never half a result under its final name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ulid import ULID

from lorasmith.errors import Conflict, DiskFull, InvalidData, LorasmithError, NotFound
from lorasmith.faults import fault_point

MANIFEST = "manifest.json"
STAGING_PREFIX = ".staging-"
STAGING_NAME = re.compile(rf"{re.escape(STAGING_PREFIX)}[0-9A-HJKMNP-TV-Z]{{26}}")  # a ULID
BLOCK_BYTES = 1 << 16
RUST_CODE = re.compile(r"\(os error (\d+)\)")
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = {
    errno.EROFS: ("the file system is read-only", "make it writable, or choose another place with --home"),
    errno.EFBIG: ("a file would be larger than this process may write", "raise the limit: ulimit -f unlimited"),
}
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of fcntl.h and stdio.h


def new_id(kind: str) -> str:
    """`<kind>_<ULID>`: sortable by time of creation."""
    return f"{kind}_{ULID()}"


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def try_lock(descriptor: int) -> bool:
    """Take the lock of an open file; False when another process has it. It ends when the last who shares it has ended."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def only_one_process(lock: Path) -> Iterator[None]:
    """Wait until no other process is in the block under this lock file."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or quota into `DiskFull`, naming the folder and how much is left; SQLite's and Rust's errors too.

    A read-only file system and a limit on the size of files are named as well.
    """
    try:
        yield
    except Exception as error:
        code = disk_code(error)
        if code in FULL:
            raise disk_full(path) from error
        if code in REFUSED:
            why, way_out = REFUSED[code]
            named = getattr(error, "filename", None)  # a library's own place may be another one
            place = existing_parent(Path(named) if isinstance(named, str) else path)
            raise LorasmithError(f"writing below {place} failed: {why}", hint=way_out) from error
        raise


def disk_code(error: Exception) -> int | None:
    """The number in `errno` of what the disk said, or None."""
    if isinstance(error, OSError):
        return error.errno
    if isinstance(error, sqlite3.OperationalError):
        return errno.ENOSPC if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL else None
    told = RUST_CODE.search(str(error))  # safetensors and tokenizers have no errno
    return int(told[1]) if told else None


def disk_full(path: Path) -> DiskFull:
    folder = existing_parent(path)
    free = shutil.disk_usage(folder).free
    return DiskFull(
        f"the disk is full: writing below {folder} failed with {free / 1e6:.0f} MB free",
        hint="free some space, or choose another place with --home",
        needed_bytes=free,
    )


def existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path if path.is_dir() else path.parent


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Write a file so that it is either the old one or the new one, whatever happens, also beside others who write it.

    `mode` is that of a new file, less the umask.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with disk_errors(path), only_writer(temporary, mode) as handle:
        try:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
            fault_point("file.written")
            temporary.replace(path)
            fault_point("file.replaced")
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def only_writer(temporary: Path, mode: int) -> Iterator[BinaryIO]:
    """The file, empty and locked: another writer waits, and then begins a new one, as this one has its final name by then."""
    while True:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT, mode), "wb") as handle:
            with suppress(OSError):  # a network file system that has no locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if is_at(handle.fileno(), temporary):
                handle.truncate(0)  # of what a crash has left
                os.fchmod(handle.fileno(), os.fstat(handle.fileno()).st_mode & mode)
                yield handle
                return


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file or folder still has that name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def append_whole(path: Path, data: bytes) -> None:
    """Add all these bytes to a file, or none of them where the disk fails."""
    with path.open("ab", buffering=0) as handle:  # a buffer would be written again when it is closed
        size_bytes = handle.tell()
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[handle.write(rest) :]
        except BaseException:
            handle.truncate(size_bytes)
            raise


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines to a file; they are on the disk when this returns. A line that a crash has torn is cut off first."""
    with disk_errors(path):
        cut_torn_line(path)
        with path.open("ab") as handle:
            handle.writelines(line.encode("utf-8") + b"\n" for line in lines)
            handle.flush()
            os.fsync(handle.fileno())


def cut_torn_line(path: Path) -> None:
    """Cut off a last line that has no line break: a crash left it while it was being written."""
    if not path.exists():
        return
    with path.open("r+b") as handle:
        whole = end_of_whole_lines(handle)
        if whole != handle.seek(0, os.SEEK_END):
            handle.truncate(whole)


def end_of_whole_lines(handle: BinaryIO) -> int:
    """Where the last line that has its line break ends, in bytes."""
    whole = handle.seek(0, os.SEEK_END)
    while whole:
        start = max(0, whole - BLOCK_BYTES)
        handle.seek(start)
        newline = handle.read(whole - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        whole = start
    return 0


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"no file {path}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"{path} is not valid JSON: {error}") from error


def read_json_if_there(path: Path) -> Any | None:
    """For a file that another process may remove: after a look whether it is there it may be gone."""
    try:
        return read_json(path)
    except NotFound:
        return None


@contextmanager
def staged_folder(target: Path, *, replace: bool = False, point: str | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `target`; on success it becomes `target` in one rename.

    Every file in it is flushed and listed with its sha256 in `manifest.json`. On an error nothing remains, and what a
    process that is gone has left there is removed. `point` names its fault points. Raises `Conflict` when `target` exists
    and `replace` is false.
    """
    if target.exists() and not replace:
        raise Conflict(f"{target} exists already", hint="choose another place, or remove it first")

    def step(name: str) -> None:
        if point is not None:
            fault_point(f"{point}.{name}")

    with disk_errors(target), scratch_folder(target.parent) as staging:
        step("begun")
        yield staging
        step("filled")
        seal(staging)
        step("sealed")
        if target.exists():
            exchange(staging, target)
        else:
            staging.rename(target)
        step("renamed")
        fsync_folder(target.parent)


def exchange(one: Path, other: Path) -> None:
    """Swap the names of two folders in one step, so that no crash leaves either name empty; Linux `renameat2`."""
    swap = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if swap is not None and swap(AT_FDCWD, bytes(one), AT_FDCWD, bytes(other), RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno() if swap is not None else errno.ENOSYS
    if code not in (errno.ENOSYS, errno.EINVAL):
        raise OSError(code, os.strerror(code), str(other))
    aside = other.with_name(
        f"{STAGING_PREFIX}{ULID()}"
    )  # a file system that cannot: for a moment, nothing has that name
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Yield an empty hidden folder, removed at the end unless it was given another name.

    It is locked as long as this process lives, so that `sweep` of another one leaves it.
    """
    sweep(parent)
    while True:
        folder = parent / f"{STAGING_PREFIX}{ULID()}"
        folder.mkdir(parents=True)
        lock = own_folder(folder)
        if lock is not None:
            break
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def own_folder(folder: Path) -> int | None:
    """Open and lock it; None when another one has it, or has removed it since, as a sweep between its making and its lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(OSError):  # a network file system that locks no folders: there nothing is swept either
        if not try_lock(descriptor):
            os.close(descriptor)
            return None
    if is_at(descriptor, folder):
        return descriptor
    os.close(descriptor)
    return None


def sweep(parent: Path) -> list[Path]:
    """Remove the hidden folders of processes that are gone; returns them. Those of a stopped import are no such: it goes on."""
    removed = []
    for folder in sorted(parent.glob(f"{STAGING_PREFIX}*")):
        if not STAGING_NAME.fullmatch(folder.name):
            continue
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:  # renamed or removed meanwhile, or not ours to read
            continue
        try:
            if try_lock(descriptor):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
        except OSError:  # whether somebody works there cannot be known
            continue
        finally:
            os.close(descriptor)
    return removed


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, that others may be writing into: it loses its name in one step, before its files go."""
    gone = folder.with_name(f"{STAGING_PREFIX}{ULID()}")
    try:
        folder.rename(gone)
    except FileNotFoundError:
        return
    shutil.rmtree(gone, ignore_errors=True)


def seal(folder: Path) -> None:
    """Flush every file and write the manifest. Files become readable for others, as umask allows."""
    digests: dict[str, dict[str, Any]] = {}
    manifest = folder / MANIFEST
    manifest.unlink(missing_ok=True)
    manifest.touch()
    allowed = manifest.stat().st_mode & 0o666  # to ask for the umask is to change it, for other threads too
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path == manifest:
            continue
        path.chmod(allowed)  # safetensors writes 0600, which a server under another user cannot read
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        relative = path.relative_to(folder).as_posix()
        digests[relative] = {"sha256": sha256_file(path), "size_bytes": path.stat().st_size}
    write_json(manifest, {"files": digests})
    for subfolder in (path for path in folder.rglob("*") if path.is_dir()):
        fsync_folder(subfolder)
    fsync_folder(folder)


def verify_manifest(folder: Path) -> None:
    """Raise `InvalidData` naming the first file that is missing or whose bytes have changed."""
    manifest = read_json(folder / MANIFEST)
    try:
        files = {relative: (entry["size_bytes"], entry["sha256"]) for relative, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError):
        raise InvalidData(f"{folder} is damaged: {MANIFEST} does not list files with their checksums") from None
    for relative, (size_bytes, sha256) in files.items():
        path = folder / relative
        if not path.is_file():
            raise InvalidData(f"{folder} is damaged: {relative} is missing")
        if path.stat().st_size != size_bytes or sha256_file(path) != sha256:
            raise InvalidData(f"{folder} is damaged: {relative} does not match its checksum")


def folder_size_bytes(folder: Path) -> int:
    """What is removed meanwhile does not count."""
    size_bytes = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                size_bytes += Path(place, name).stat().st_size
    return size_bytes
