"""Products in 16-bit integers: against a float64 closed form of the codes, and how much they round beside bf16."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorasmith.engine.lora import integer_products
from lorasmith.engine.lora.frozen import IntegerMatrix
from lorasmith.engine.lora.integer_products import (
    INSTRUCTIONS,
    NoIntegers,
    coded,
    integer_product,
    why_no_integers,
)
from lorasmith.engine.models.workspace import Workspace
from tests.engine.decoder_cases import needs_integers

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (5, 7, 9), (13, 100, 130), (64, 48, 128), (70, 200, 1300), (9, 2100, 60)]  # rows, out, in


@pytest.fixture(params=list(INSTRUCTIONS))
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each set that this CPU has, by itself."""
    name = request.param
    if not integer_products.loaded_for(name, str(shutil.which("gcc"))).supported():
        pytest.skip(f"the CPU has no {name}")
    monkeypatch.setattr(integer_products, "INSTRUCTIONS", {name: INSTRUCTIONS[name]})
    integer_products.library_or_reason.cache_clear()
    yield
    integer_products.library_or_reason.cache_clear()


in_each_set = pytest.mark.usefixtures("instructions")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def decoded(x: Tensor) -> Tensor:
    """What the codes of x (…, K) stand for, in fp64: blocks of 128 along the last dimension, each with its largest value.

    The codes are computed in fp32, as half-way between two of them the last bit decides.
    """
    size = x.shape[-1]
    padded = torch.nn.functional.pad(x.float(), (0, -size % 128)).unflatten(-1, (-1, 128))
    largest = padded.abs().amax(-1, keepdim=True)
    factor = torch.full_like(largest, 4095) / largest  # `4095 / largest` would be a reciprocal, rounded twice
    codes = torch.where(largest > 0, (padded * factor).round(), 0).double()
    return (codes * largest.double() / 4095).flatten(-2)[..., :size]


def product(x: Tensor, *parts: Tensor) -> Tensor:
    return IntegerMatrix(*parts).forward(x, None, Workspace(torch.float32), "y").clone()


def gradient(dy: Tensor, *parts: Tensor) -> Tensor:
    return IntegerMatrix(*parts).backward(dy, Workspace(torch.float32), "dx").clone()


def rounded(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


@needs_integers
@in_each_set
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "out", "into"), SHAPES)
def test_products_are_those_of_the_codes(rows: int, out: int, into: int, dtype: torch.dtype) -> None:
    x, dy, weight = noise(rows, into), noise(rows, out, seed=1), noise(out, into, seed=2).to(dtype)
    towards, back = decoded(x) @ decoded(weight).t(), decoded(dy) @ decoded(weight.t()).t()
    torch.testing.assert_close(product(x, weight).double(), towards, rtol=1e-5, atol=1e-6 * math.sqrt(into))
    torch.testing.assert_close(gradient(dy, weight).double(), back, rtol=1e-5, atol=1e-6 * math.sqrt(out))


@needs_integers
@in_each_set
@pytest.mark.parametrize("weight_of_outlier", [1.0, 0.1, 0.01, 0.0])
@pytest.mark.parametrize("outlier", [1.0, 10.0, 30.0, 100.0, 1000.0, 1e5])
@pytest.mark.parametrize("of_a_block", [1, 3])
def test_they_round_less_than_bf16(of_a_block: int, outlier: float, weight_of_outlier: float) -> None:
    """Also where values of each block are far larger than all others, as in activations of large models, and weigh little."""
    x, weight = noise(200, 512), noise(300, 512, seed=1)
    for place in range(of_a_block):
        x[:, 17 * place :: 128] *= outlier
        weight[:, 17 * place :: 128] *= weight_of_outlier
    exact = x.double() @ weight.double().t()
    in_bf16 = rounded((x.bfloat16().double() @ weight.bfloat16().double().t()), exact)  # without that of its result
    ours = rounded(product(x, weight), exact)
    assert ours < in_bf16
    if outlier == 1:
        assert ours < in_bf16 / 5


@needs_integers
@in_each_set
def test_a_row_does_not_depend_on_others_or_on_threads() -> None:
    x, weight = noise(1100, 1200), noise(100, 1200, seed=1)  # more rows, and more blocks, than are taken at once
    x[16, 5] = x[20, 200] = x[1099, 1190] = 1000  # an outlier has no effect on the rows beside it
    whole = product(x, weight)
    for row in (16, 17, 18, 20, 1050, 1099):
        assert torch.equal(product(x[row : row + 1], weight), whole[row : row + 1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 3)
    try:
        assert torch.equal(product(x, weight), whole)
    finally:
        torch.set_num_threads(threads)


@needs_integers
@in_each_set
def test_parts_one_below_the_other_are_one_matrix() -> None:
    x, dy, parts = noise(20, 64), noise(20, 130, seed=1), [noise(100, 64, seed=2), noise(30, 64, seed=3)]
    assert torch.equal(product(x, *parts), torch.cat([product(x, part) for part in parts], dim=1))
    sums = gradient(dy[:, :100].contiguous(), parts[0]) + gradient(dy[:, 100:].contiguous(), parts[1])
    assert torch.equal(gradient(dy, *parts), sums)
    bias = noise(130, seed=4)
    with_bias = IntegerMatrix(*parts).forward(x, bias, Workspace(torch.float32), "y")
    assert torch.equal(with_bias, product(x, *parts) + bias)


@needs_integers
@in_each_set
def test_the_largest_sums_do_not_overflow() -> None:
    x, weight = torch.ones(8, 1280), torch.ones(48, 1280)
    torch.testing.assert_close(product(x, weight), torch.full((8, 48), 1280.0))
    torch.testing.assert_close(product(-x, weight), torch.full((8, 48), -1280.0))


@needs_integers
@in_each_set
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_not_finite(bad: float) -> None:
    """In its own row, or its own output: a run that explodes has to be seen."""
    x, weight = noise(10, 200), noise(60, 200, seed=1)
    spoiled = x.clone()
    spoiled[3, 150] = bad
    ours = product(spoiled, weight)
    assert ours[3].isnan().all()
    assert torch.equal(ours[4:], product(x, weight)[4:])
    weight[5, 7] = bad
    assert product(x, weight)[:, 5].isnan().all()
    assert gradient(noise(10, 60), weight)[:, 7].isnan().all()


@needs_integers
@in_each_set
def test_zeros_and_no_rows() -> None:
    assert torch.equal(product(torch.zeros(3, 130), noise(50, 130)), torch.zeros(3, 50))
    assert torch.equal(product(noise(3, 130), torch.zeros(50, 130)), torch.zeros(3, 50))
    assert torch.equal(product(torch.full((1, 4), 1e-35), noise(5, 4)), torch.zeros(1, 5))
    assert product(noise(0, 130), noise(50, 130)).shape == (0, 50)


@needs_integers
def test_memory_is_not_read_beyond_what_is_given() -> None:
    workspace, x, weight = Workspace(torch.float32), noise(9, 64), noise(10, 64)
    codes = coded(x, workspace)
    for wrong in (
        lambda: integer_product(codes, noise(10, 300), torch.empty(9, 10)),
        lambda: integer_product(codes, weight, torch.empty(20, 10)),
        lambda: integer_product(codes, weight, torch.empty(9, 11)),
        lambda: integer_product(codes, weight, torch.empty(9, 10, dtype=torch.bfloat16)),
        lambda: integer_product(codes, weight.double(), torch.empty(9, 10)),
        lambda: integer_product(codes, noise(64, 10).t(), torch.empty(9, 10)),
        lambda: coded(x.double(), workspace),
        lambda: coded(noise(64, 9).t(), workspace),
    ):
        with pytest.raises(ValueError, match=r"codes of|out of|weights in|x has|x of"):
            wrong()


@needs_integers
def test_its_threads_are_those_of_torch() -> None:
    product(noise(3, 4), noise(5, 4))
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of the user in which nothing is compiled yet."""
    integer_products.library_or_reason.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    yield tmp_path
    integer_products.library_or_reason.cache_clear()


@needs_gcc
def test_a_folder_that_cannot_be_written_is_a_reason(own_cache: Path) -> None:
    (own_cache / "lorasmith").write_text("no folder", encoding="utf-8")
    assert "cannot be compiled into the cache of this user" in str(why_no_integers())


@needs_gcc
def test_what_others_may_write_is_not_run(own_cache: Path) -> None:
    (own_cache / "lorasmith").mkdir()
    (own_cache / "lorasmith").chmod(0o777)
    assert "others than this user may write" in str(why_no_integers())


@needs_gcc
def test_what_cannot_be_loaded_is_a_reason(own_cache: Path) -> None:
    path = integer_products.compiled("AVX-512 VNNI", str(shutil.which("gcc")))
    path.chmod(0o700)
    path.write_bytes(path.read_bytes()[:100])
    assert "not be loaded from there" in str(why_no_integers())


@needs_gcc
def test_what_does_not_compile_is_a_reason(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_products, "SOURCE", own_cache / "broken.c")
    (own_cache / "broken.c").write_text("int supported(void) { return }", encoding="utf-8")
    assert "gcc cannot compile them" in str(why_no_integers())
    assert not list((own_cache / "lorasmith").iterdir())


def test_without_a_compiler_there_is_a_reason(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(own_cache))
    assert why_no_integers() == "there is no gcc"
    with pytest.raises(NoIntegers):
        integer_products.library()
