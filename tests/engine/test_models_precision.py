"""What `auto` takes, from what a machine is measured to do."""

from __future__ import annotations

import psutil
import pytest
import torch

from lorasmith.engine.models import precision
from lorasmith.engine.models.precision import Probe, choose_memory, choose_precision

GIB = 1 << 30


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8 * GIB}))


def machine(monkeypatch: pytest.MonkeyPatch, *, bf16: float, packed: float) -> None:
    """A machine whose products take those times, of 1 s in fp32, and which does something else in every second measurement."""

    def probe(dtype: torch.dtype, *, packed: bool = False) -> Probe:
        seconds = (bf16 if dtype is torch.bfloat16 else 1.0) * (gain if packed else 1.0)
        calls = iter(range(1000))
        return lambda: seconds * (1 + next(calls) % 2)

    gain = packed
    monkeypatch.setattr(precision, "matrix_probe", probe)


@pytest.mark.parametrize(("bf16", "chosen"), [(0.25, "bf16"), (0.7, "bf16"), (0.9, "fp32"), (3.0, "fp32")])
def test_bf16_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch, bf16: float, chosen: str) -> None:
    machine(monkeypatch, bf16=bf16, packed=1.0)
    assert choose_precision("auto") == chosen


@pytest.mark.parametrize(
    ("packed", "extra_bytes", "chosen"),
    [(0.8, GIB, "fast"), (0.98, GIB, "lean"), (1.2, GIB, "lean"), (0.8, 5 * GIB, "lean")],
)
def test_packed_weights_where_they_are_faster_and_fit(
    monkeypatch: pytest.MonkeyPatch, packed: float, extra_bytes: int, chosen: str
) -> None:
    machine(monkeypatch, bf16=3.0, packed=packed)
    assert choose_memory("auto", torch.float32, extra_bytes) == chosen


def test_a_probe_times_its_product() -> None:
    for packed in (False, True):
        assert precision.matrix_probe(torch.float32, packed=packed)() > 0
