from __future__ import annotations

import errno
import os
import resource
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file
from ulid import ULID

from lorasmith import files
from lorasmith.errors import Conflict, DiskFull, InvalidData, LorasmithError
from lorasmith.files import (
    append_lines,
    cut_torn_line,
    disk_errors,
    folder_size_bytes,
    new_id,
    scratch_folder,
    staged_folder,
    sweep,
    verify_manifest,
    write_bytes,
    write_text,
)
from tests.conftest import read_only


def test_a_staged_folder_appears_whole_with_a_manifest(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with staged_folder(target) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "weights").write_bytes(b"123")
        assert not target.exists()
    assert (target / "inner" / "weights").read_bytes() == b"123"
    verify_manifest(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_failure_while_staging_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "adapter") as folder:
        (folder / "half").write_text("…", encoding="utf-8")
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_staging_over_something_that_exists_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="exists already"), staged_folder(tmp_path):
        pass


def test_what_a_dead_process_left_is_swept_and_what_a_living_one_fills_is_not(tmp_path: Path) -> None:
    left, import_work = tmp_path / f".staging-{ULID()}", tmp_path / ".staging-import-rows"
    for folder in (left, import_work):
        folder.mkdir()
        (folder / "half").touch()
    with scratch_folder(tmp_path) as filled:
        assert not left.exists(), "who writes beside it removes it"
        left.mkdir()
        assert sweep(tmp_path) == [left]
        assert filled.exists()
    assert sorted(tmp_path.iterdir()) == [import_work]


@pytest.mark.parametrize("supported", [True, False], ids=["in-one-step", "in-two"])
def test_a_folder_is_replaced_by_one_that_is_whole(
    supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not supported:
        monkeypatch.setattr("lorasmith.files.RENAME_EXCHANGE", 1 << 20)  # EINVAL, as from a file system without it
    for text in ("old", "new"):
        with staged_folder(tmp_path / "a", replace=True) as folder:
            write_text(folder / "x", text)
    verify_manifest(tmp_path / "a")
    assert (tmp_path / "a" / "x").read_text(encoding="utf-8") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_flipped_byte_and_a_missing_file_are_found(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "a") as folder:
        write_text(folder / "x", "abc")
        write_text(folder / "y", "abc")
    (tmp_path / "a" / "x").write_text("abd", encoding="utf-8")
    with pytest.raises(InvalidData, match="x does not match its checksum"):
        verify_manifest(tmp_path / "a")
    (tmp_path / "a" / "x").unlink()
    with pytest.raises(InvalidData, match="x is missing"):
        verify_manifest(tmp_path / "a")


def test_files_written_private_become_readable_for_a_server_under_another_user(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "a") as folder:
        (folder / "weights").touch(mode=0o600)
    assert (tmp_path / "a" / "weights").stat().st_mode & 0o777 == 0o666 & ~os.umask(os.umask(0o022) or 0o022)


def test_two_who_write_one_file_at_once_both_write_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    with ThreadPoolExecutor() as pool:
        second: list[Future[None]] = []

        def begin_another(point: str) -> None:
            if not second:
                second.append(pool.submit(write_bytes, path, b"the second"))
                time.sleep(0.2)  # until it has begun
                assert not path.exists()

        monkeypatch.setattr(files, "fault_point", begin_another)
        write_bytes(path, b"the first one, which is longer")
        second[0].result()
    assert path.read_bytes() == b"the second"
    assert list(tmp_path.iterdir()) == [path]


def test_sealing_a_folder_leaves_the_umask_of_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "umask", None)
    with staged_folder(tmp_path / "a") as folder:
        write_text(folder / "x", "abc")
    verify_manifest(tmp_path / "a")


def test_files_that_are_removed_while_they_are_counted_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files_there = [tmp_path / "a", tmp_path / "b"]
    for path in files_there:
        write_text(path, "abc")
    stat = Path.stat

    def look_then_remove(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        found = stat(path, follow_symlinks=follow_symlinks)
        if path in files_there:
            for removed in files_there:
                removed.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "stat", look_then_remove)
    assert folder_size_bytes(tmp_path) == 3


def test_ids_sort_by_time() -> None:
    ids = [new_id("job") for _ in range(3)]
    assert all(one.startswith("job_") for one in ids)
    assert len(set(ids)) == 3


def test_a_full_disk_is_named_and_the_old_file_survives(small_disk: Path) -> None:
    write_text(small_disk / "state.json", "old")
    with pytest.raises(DiskFull, match="the disk is full: writing below .* failed with"):
        write_bytes(small_disk / "state.json", b"x" * 2_000_000)
    assert (small_disk / "state.json").read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in small_disk.iterdir()) == ["state.json"]


def test_a_folder_that_does_not_fit_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(DiskFull), staged_folder(small_disk / "adapter") as folder:
        (folder / "weights").write_bytes(b"x" * 2_000_000)
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_is_named_where_safetensors_writes(small_disk: Path) -> None:
    """Its error has no errno."""
    with (
        pytest.raises(DiskFull, match="the disk is full: writing below"),
        staged_folder(small_disk / "adapter") as folder,
    ):
        save_file({"weight": np.zeros(1_000_000)}, folder / "weights.safetensors")
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_the_errors_of_rust_are_told_apart_by_their_number(tmp_path: Path, code: int) -> None:
    failed = SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
    with pytest.raises(SafetensorError if code == errno.EIO else DiskFull), disk_errors(tmp_path):
        raise failed


def test_a_read_only_file_system_is_named_and_nothing_stays(tmp_path: Path) -> None:
    write_text(tmp_path / "state.json", "old")
    with read_only(tmp_path):
        with pytest.raises(LorasmithError, match="writing below .* failed: the file system is read-only"):
            write_text(tmp_path / "state.json", "new")
        with pytest.raises(LorasmithError, match="the file system is read-only"), staged_folder(tmp_path / "adapter"):
            pass
    assert [(path.name, path.read_text(encoding="utf-8")) for path in tmp_path.iterdir()] == [("state.json", "old")]


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    """Also where safetensors writes, whose error has no errno."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    told = pytest.raises(LorasmithError, match="a file would be larger than this process may write")
    try:
        with told, staged_folder(tmp_path / "adapter") as folder:
            save_file({"weight": np.zeros(100_000)}, folder / "weights.safetensors")
        with told:
            write_bytes(tmp_path / "rows", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("torn", [b"", b'{"half', b"x" * 200_000])
def test_a_line_is_added_after_whole_lines_alone(tmp_path: Path, torn: bytes) -> None:
    """What a crash has torn is cut off, also where it is longer than a block."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"one\ntwo\n" + torn)
    append_lines(path, ["three", "vier ü"])
    assert path.read_text(encoding="utf-8") == "one\ntwo\nthree\nvier ü\n"
    path.write_bytes(torn)
    cut_torn_line(path)
    assert path.read_bytes() == b""
    cut_torn_line(tmp_path / "missing")
