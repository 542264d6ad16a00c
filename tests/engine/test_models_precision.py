"""What `auto` takes, from what a machine is measured to do."""

from __future__ import annotations

import psutil
import pytest

from lorasmith.engine.models import precision
from lorasmith.engine.models.precision import Probe, choose_memory, choose_precision, native_precision
from lorasmith.errors import InvalidSpec

GIB = 1 << 30


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8 * GIB}))


def machine(
    monkeypatch: pytest.MonkeyPatch, *, bf16: float = 3.0, int16: float | None = None, packed: float = 1.0
) -> None:
    """A machine whose products take those times, of 1 s in fp32, and which does something else in every second measurement."""

    def probe(wanted: precision.Precision, *, packed: bool = False) -> Probe:
        seconds = {"bf16": bf16, "int16": int16 or 0.0, "fp32": 1.0}[wanted] * (gain if packed else 1.0)
        calls = iter(range(1000))
        return lambda: seconds * (1 + next(calls) % 2)

    gain = packed
    monkeypatch.setattr(precision, "why_no_integers", lambda: "there is no gcc" if int16 is None else None)
    monkeypatch.setattr(precision, "matrix_probe", probe)


@pytest.mark.parametrize(("bf16", "chosen"), [(0.25, "bf16"), (0.7, "bf16"), (0.9, "fp32"), (3.0, "fp32")])
def test_bf16_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch, bf16: float, chosen: str) -> None:
    machine(monkeypatch, bf16=bf16)
    assert choose_precision("auto") == native_precision() == chosen


@pytest.mark.parametrize(
    ("bf16", "int16", "chosen"), [(0.5, 0.5, "bf16"), (0.9, 0.6, "int16"), (3.0, 0.9, "fp32"), (3.0, None, "fp32")]
)
def test_int16_where_it_is_clearly_faster_and_bf16_is_not(
    monkeypatch: pytest.MonkeyPatch, bf16: float, int16: float | None, chosen: str
) -> None:
    machine(monkeypatch, bf16=bf16, int16=int16)
    assert choose_precision("auto") == chosen
    assert choose_memory("fast", "int16", 0) == "lean"


def test_int16_is_refused_where_it_cannot_be_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    with pytest.raises(InvalidSpec, match="cannot be computed here: there is no gcc"):
        choose_precision("int16")
    machine(monkeypatch, int16=0.5)
    assert choose_precision("int16") == "int16"
    with pytest.raises(InvalidSpec, match="for a CPU"):
        choose_precision("int16", "cuda")


@pytest.mark.parametrize(
    ("packed", "extra_bytes", "chosen"),
    [(0.8, GIB, "fast"), (0.98, GIB, "lean"), (1.2, GIB, "lean"), (0.8, 5 * GIB, "lean")],
)
def test_packed_weights_where_they_are_faster_and_fit(
    monkeypatch: pytest.MonkeyPatch, packed: float, extra_bytes: int, chosen: str
) -> None:
    machine(monkeypatch, bf16=3.0, packed=packed)
    assert choose_memory("auto", "fp32", extra_bytes) == chosen


def test_a_probe_times_its_product() -> None:
    for packed in (False, True):
        assert precision.matrix_probe("fp32", packed=packed)() > 0
