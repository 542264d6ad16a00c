"""What frozen layers compute, kept on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorasmith.engine.models.families import read_decoder
from lorasmith.engine.models.prefix_cache import CHECKSUMS, STREAMS, PrefixCache
from lorasmith.engine.training.computation import PackedComputation
from lorasmith.errors import DiskFull
from tests.engine.decoder_cases import adapted, adapter_gradients, random_rows, tiny_base, worst_difference

LENGTHS = [12, 30, 7, 18]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_read_as_it_was_written_also_by_another_process(tmp_path: Path, dtype: torch.dtype) -> None:
    stream = torch.randn(30, 8).to(dtype)
    cache = PrefixCache(tmp_path, LENGTHS, 8, dtype, 10**6)
    assert cache.read(1) is None
    cache.write(1, stream)
    assert torch.equal(PrefixCache(tmp_path, LENGTHS, 8, dtype, 10**6).read(1), stream)  # type: ignore[arg-type]
    assert cache.read(0) is None


@pytest.mark.parametrize("name", [STREAMS, CHECKSUMS])
def test_a_damaged_row_is_computed_again(tmp_path: Path, name: str) -> None:
    PrefixCache(tmp_path, LENGTHS, 8, torch.float32, 10**6).write(0, torch.randn(12, 8))
    data = bytearray((tmp_path / name).read_bytes())
    data[2] ^= 1
    (tmp_path / name).write_bytes(data)
    assert PrefixCache(tmp_path, LENGTHS, 8, torch.float32, 10**6).read(0) is None


def test_rows_beyond_the_limit_are_not_kept(tmp_path: Path) -> None:
    cache = PrefixCache(tmp_path, LENGTHS, 8, torch.float32, (12 + 30) * 8 * 4 + 5)
    assert [cache.keeps(row) for row in range(4)] == [True, True, False, False]
    cache.write(2, torch.randn(7, 8))
    assert cache.read(2) is None
    assert (tmp_path / STREAMS).stat().st_size == (12 + 30) * 8 * 4


def test_a_disk_without_room_is_a_clear_error_and_nothing_stays(small_disk: Path) -> None:
    lengths = [100_000]
    with pytest.raises(
        DiskFull, match=r"failed with 1 MB free; what the frozen layers compute takes 3.2 MB"
    ) as failure:
        PrefixCache(small_disk / "prefix", lengths, 8, torch.float32, 10**9)
    assert "training.prefix_cache_gb" in str(failure.value.hint)
    assert list(small_disk.iterdir()) == []


def test_the_room_is_reserved_before_the_first_row(small_disk: Path) -> None:
    cache = PrefixCache(small_disk / "prefix", [10_000], 8, torch.float32, 10**9)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "other").write_bytes(b"x" * 900_000)
    stream = torch.randn(10_000, 8)
    cache.write(0, stream)  # into a full disk
    assert torch.equal(cache.read(0), stream)  # type: ignore[arg-type]


def test_validation_rows_are_not_taken_for_rows_of_the_cache(tmp_path: Path) -> None:
    rows = random_rows(LENGTHS)
    decoder = read_decoder(adapted(tiny_base("llama"), dropout=0.1, target_modules=["q_proj"], layers_to_transform=[2]))
    cache = PrefixCache(tmp_path, LENGTHS, 48, torch.float32, (12 + 30) * 48 * 4)
    computation = PackedComputation(decoder, seed=0, micro_batch_tokens=100, cache=cache)
    assert computation.micro_batches(range(4), rows) == [[0, 1], [2, 3]]
    assert computation.micro_batches(range(4), rows, trained=False) == [[2, 0, 3, 1]]


@pytest.mark.parametrize("limit_bytes", [10**6, 12 * 48 * 4 + 30 * 48 * 4])
def test_the_second_epoch_reads_and_learns_the_same(
    tmp_path: Path, limit_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, order = random_rows(LENGTHS), list(range(4))
    model = adapted(tiny_base("llama"), target_modules=["q_proj", "down_proj"], layers_to_transform=[2])
    decoder = read_decoder(model)
    cache = PrefixCache(tmp_path, LENGTHS, 48, torch.float32, limit_bytes)
    cached = PackedComputation(decoder, seed=0, micro_batch_tokens=100, cache=cache)
    plain = PackedComputation(decoder, seed=0, micro_batch_tokens=100)
    found = []
    for computation in (plain, cached, cached):
        model.zero_grad(set_to_none=True)
        for group in computation.micro_batches(order, rows):
            computation.gradients(group, rows, scale=0.01, step=0)
        found.append(adapter_gradients(model))
        if len(found) == 2 and limit_bytes == 10**6:
            monkeypatch.setattr(cached.decoder, "prefix", None)  # nothing below is computed any more
    assert worst_difference(found[1], found[0]) <= 1e-5  # fp32, other packs
    for name, gradient in found[1].items():
        assert torch.equal(gradient, found[2][name]), name
