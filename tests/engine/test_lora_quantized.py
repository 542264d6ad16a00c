"""Weights in 4 and 8 bits against bitsandbytes, and LoftQ against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lorasmith.engine.lora.quantized import Blocks, Magnitudes, Quantization, dynamic_table, quantize, table
from lorasmith.engine.lora.quantized_linear import QuantizedLinear
from lorasmith.engine.training.initial import loftq

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(192, 320), (65, 34), (3, 6)]  # whole blocks; neither rows nor the whole in whole blocks; less than one


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes").functional


def random_weight(shape: tuple[int, int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 0.02
    weight[0] = 0  # a block of zeros has no largest value to divide by
    return weight.to(dtype)


def dequantized(weight: torch.Tensor, quantization: Quantization, dtype: torch.dtype) -> torch.Tensor:
    return quantize(weight, quantization).dequantize(torch.full(weight.shape, torch.nan, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_those_of_bitsandbytes(bnb: Any, kind: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random_weight(shape, dtype)
    codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=False)
    assert torch.equal(dequantized(weight, Quantization(kind, False), dtype), bnb.dequantize_4bit(codes, state))
    assert torch.equal(table(kind), bnb.get_4bit_type(kind, "cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitsandbytes_reads_our_codes_as_a_gpu_gives_them_to_it(bnb: Any, dtype: torch.dtype) -> None:
    stored = quantize(random_weight((192, 320)), Quantization("nf4"))
    assert isinstance(stored, Blocks)
    state = bnb.QuantState(stored.magnitudes.read(), (192, 320), blocksize=64, quant_type="nf4", dtype=dtype)
    theirs = bnb.dequantize_4bit(stored.codes[:, None], state)
    assert torch.equal(theirs, stored.dequantize(torch.empty(192, 320, dtype=dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_what_bitsandbytes_quantised_twice_is_read_bit_for_bit(bnb: Any, kind: Any, dtype: torch.dtype) -> None:
    weight = random_weight((192, 320), dtype)
    codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    assert torch.equal(dynamic_table(), state.state2.code)
    magnitudes = Magnitudes(state.absmax, state.state2.absmax, state.offset)
    ours = Blocks((192, 320), kind, codes.view(-1), magnitudes).dequantize(torch.empty(192, 320, dtype=dtype))
    assert torch.equal(ours, bnb.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_double_quantisation_takes_the_nearest_magnitude_where_bitsandbytes_sometimes_takes_its_neighbour(
    bnb: Any, kind: Any
) -> None:
    weight = random_weight((512, 640))
    codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    stored = quantize(weight, Quantization(kind))
    assert isinstance(stored, Blocks)
    exact = weight.view(-1, 64).abs().amax(1)
    theirs = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    ours = stored.magnitudes.read()
    assert ((ours - exact).abs() <= (theirs - exact).abs() + 1e-7).all()
    assert (ours != theirs).float().mean() < 0.005
    torch.testing.assert_close(
        dequantized(weight, Quantization(kind), torch.float32), bnb.dequantize_4bit(codes, state), atol=7.5e-4, rtol=0
    )  # one 8-bit step of a magnitude: 0.9 / 64 of 0.05


def test_int8_rows_are_those_of_llm_int8(bnb: Any) -> None:
    weight = random_weight((65, 33))[1:]
    codes, largest, _ = bnb.int8_vectorwise_quant(weight.clone())
    ours = dequantized(weight, Quantization("int8"), torch.float32)
    torch.testing.assert_close(ours, codes * (largest / 127)[:, None], atol=1e-8, rtol=0)
    assert ((ours - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 + 1e-8).all()  # half a step
    assert dequantized(random_weight((2, 33)), Quantization("int8"), torch.bfloat16)[0].abs().max() == 0


@pytest.mark.parametrize(
    ("quantization", "bits"),
    [(Quantization("nf4"), 4.1272), (Quantization("fp4", False), 4.5), (Quantization("int8"), 8.0625)],
    ids=str,
)
def test_bits_of_a_weight(quantization: Quantization, bits: float) -> None:
    """4 + 32 / 64; 4 + 8 / 64 + 32 / (64 · 256), and the mean; 8 + 32 / 512."""
    assert 8 * quantize(torch.randn(512, 512), quantization).nbytes / 512**2 == pytest.approx(bits, abs=1e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_layer_trains_the_same_before_and_after_an_evaluation(kind: Any) -> None:
    """bitsandbytes' own 4-bit layer packs its weight in an evaluation on some machines, and loses its gradient."""
    layer = QuantizedLinear(lambda: random_weight((65, 33)), torch.randn(65), Quantization(kind), torch.float32)
    plain = layer.dequantized()
    x = torch.randn(4, 7, 33, requires_grad=True)
    (expected,) = torch.autograd.grad(F.linear(x, plain, layer.bias).square().sum(), x)
    for _ in range(2):
        output = layer.train()(x)
        torch.testing.assert_close(output, F.linear(x, plain, layer.bias), atol=1e-6, rtol=0)  # float32
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)
        with torch.no_grad():
            layer.eval()(x)
        assert torch.equal(layer.dequantized(), plain)


def test_one_round_of_loftq_is_the_best_of_its_rank() -> None:
    """Eckart-Young in float64: what is left of W - Q has the norm of its smaller singular values."""
    weight, rank, scale = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)), 6, 2.0
    quantization = Quantization("nf4")
    A, B, first_A, first_B = loftq(weight, rank, scale, quantization, iterations=1)
    assert (A.shape, B.shape) == ((6, 128), (96, 6))
    assert (first_A.numel(), first_B.numel()) == (0, 0)
    error = (weight - dequantized(weight, quantization, torch.float32)).double()
    best = torch.linalg.svdvals(error)[rank:].square().sum().sqrt()
    left = torch.linalg.norm(error - scale * (B @ A).double())
    assert left.item() == pytest.approx(best.item(), rel=1e-5)  # float32
    assert left < torch.linalg.norm(error)


def test_more_rounds_of_loftq_leave_less() -> None:
    """Weights with a few strong directions, as trained ones have."""
    generator = torch.Generator().manual_seed(1)
    strong = torch.randn(96, 8, generator=generator) @ torch.randn(8, 128, generator=generator)
    weight, quantization, errors = strong + torch.randn(96, 128, generator=generator), Quantization("nf4"), []
    for rounds in (1, 2, 5):
        A, B, taken_A, taken_B = loftq(weight, 8, 1.0, quantization, rounds)
        stored = dequantized(weight - taken_B @ taken_A, quantization, torch.float32)
        best = torch.linalg.svdvals((weight - stored).double())[8:].square().sum().sqrt().item()
        errors.append(torch.linalg.norm(weight - stored - B @ A).item())
        assert errors[-1] == pytest.approx(best, rel=1e-4)  # each round ends with the best of its rank
    assert (
        errors[2] < errors[1] < errors[0] < torch.linalg.norm(weight - dequantized(weight, quantization, torch.float32))
    )
