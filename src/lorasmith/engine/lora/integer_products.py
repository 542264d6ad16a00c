"""Products with a frozen matrix in integers (integer_products.c), compiled by this machine's GCC when first asked for.

Each factor is cut along the sum into blocks of 128 values with a scale and 13-bit codes, so that what is rounded is at most
1/8190 of the largest value of a block: an eighth of what bf16 rounds of normally distributed values, and no more than bf16 where
one value of a block is far larger than all others. The CPU multiplies 32 pairs of 16 bits at a time where it multiplies 16 of fp32.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorasmith.engine.models.workspace import Workspace

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ["-O3", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni", "-mfma", "-fopenmp", "-shared", "-fPIC"]
FLAGS += ["-ffp-contract=off"]  # else some rows of a tile would be rounded once less than others
BLOCK, TILE_ROWS = 128, 8  # as in the source
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

OPERATORS = torch.library.Library("lorasmith", "DEF")
OPERATORS.define("quantize(Tensor x, Tensor(a!) codes, Tensor(b!) scales) -> ()")
OPERATORS.define(
    "integer_product(Tensor codes, Tensor scales, Tensor weight, Tensor(a!) out, *, bool along_rows, bool add) -> ()"
)


class NoIntegers(Exception):
    """Why this machine cannot compute these products."""


@cache
def library() -> Any:
    """The compiled functions. Raises `NoIntegers`."""
    compiler = shutil.which("gcc")
    if compiler is None:
        raise NoIntegers("there is no gcc")
    loaded = ctypes.CDLL(str(compiled(compiler)))
    if not loaded.supported():
        raise NoIntegers("the CPU has no AVX-512 VNNI")
    loaded.quantize.restype = None
    return loaded


def compiled(compiler: str) -> Path:
    """The shared library of this source and compiler, in the user's cache. Raises `NoIntegers`."""
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True).stdout
    command = [compiler, *FLAGS, str(SOURCE), *openmp_of_torch(), "-Wl,--as-needed"]
    digest = hashlib.sha256(repr((SOURCE.read_bytes(), command, version)).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorasmith"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{SOURCE.stem}-{digest}.so"
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as own:
                made = Path(own) / path.name
                run = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
                if run.returncode:
                    raise NoIntegers(f"{compiler} cannot compile them: {' '.join(run.stderr.split())[:200]}")
                made.replace(path)  # whole at once, whoever else compiles it now
        if path.stat().st_uid != os.getuid():
            raise NoIntegers(f"{path} belongs to another user")
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        raise NoIntegers(f"they cannot be compiled into the cache of this user: {error}") from error
    return path


def openmp_of_torch() -> list[str]:
    """Its own copy, under whatever name: the threads of a second one would wait for those of the first, which spin."""
    folder = Path(torch.__file__).parent
    return [str(path) for place in ("lib", "../torch.libs") for path in sorted((folder / place).glob("libgomp*"))]


def why_no_integers() -> str | None:
    """None where this machine computes these products."""
    try:
        library()
    except NoIntegers as reason:
        return str(reason)
    return None


def coded(x: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Codes and scales of x (T, K), in buffers that the next call overwrites."""
    rows = -(-len(x) // TILE_ROWS) * TILE_ROWS
    blocks = -(-x.shape[1] // BLOCK)
    codes = workspace.take("codes", blocks, rows, BLOCK, dtype=torch.int16)
    scales = workspace.take("scales", blocks, rows, dtype=torch.float32)
    torch.ops.lorasmith.quantize(x, codes, scales)
    return codes, scales


def integer_product(
    codes: tuple[Tensor, Tensor], weight: Tensor, out: Tensor, *, along_rows: bool = False, add: bool = False
) -> None:
    """out (T, N) = x W^T for weight (N, K), or x W for weight (K, N) `along_rows`; `add`: to what out holds.

    `codes` are what `coded` made of x; weight is contiguous, in fp32, bf16 or fp16, out in fp32 with contiguous rows.
    """
    torch.ops.lorasmith.integer_product(*codes, weight, out, along_rows=along_rows, add=add)


@torch.library.impl(OPERATORS, "quantize", "CPU")
def quantize_on_cpu(x: Tensor, codes: Tensor, scales: Tensor) -> None:
    check(x.dtype == torch.float32 and x.stride(1) == 1, "x has to be fp32 with contiguous rows")
    library().quantize(
        pointer(x), *longs(len(x), x.shape[1], x.stride(0)), pointer(codes), pointer(scales), torch.get_num_threads()
    )


@torch.library.impl(OPERATORS, "integer_product", "CPU")
def multiply_on_cpu(codes: Tensor, scales: Tensor, weight: Tensor, out: Tensor, *, along_rows: bool, add: bool) -> None:
    if not len(out):
        return
    terms, outputs = weight.shape if along_rows else reversed(weight.shape)
    blocks, rows = -(-terms // BLOCK), -(-len(out) // TILE_ROWS) * TILE_ROWS
    check(codes.shape == (blocks, rows, BLOCK) and scales.shape == (blocks, rows), "codes of another shape")
    check(out.shape[1] == outputs and out.stride(1) == 1 and out.dtype == torch.float32, "out of another form")
    check(weight.is_contiguous() and weight.dtype in DTYPES, f"weights in {weight.dtype}, or not contiguous")
    failed = library().multiply(
        pointer(codes),
        pointer(scales),
        ctypes.c_long(len(out)),
        pointer(weight),
        DTYPES[weight.dtype],
        *longs(*weight.shape),
        int(along_rows),
        pointer(out),
        *longs(out.stride(0)),
        int(add),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the panels of a product")


def check(holds: bool, what: str) -> None:
    """Before memory is read by address."""
    if not holds:
        raise ValueError(what)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def longs(*values: int) -> list[ctypes.c_long]:
    return [ctypes.c_long(value) for value in values]
