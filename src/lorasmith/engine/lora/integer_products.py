"""Products with a frozen matrix in integers (integer_products.c), compiled by this machine's GCC when first asked for.

Each factor is cut along the sum into blocks of 128 values with a scale and 13-bit codes, so that what is rounded is at most
1/8190 of the largest value of a block: an eighth of what bf16 rounds of normally distributed values. Where one value of x is far larger than
the others of its block, it is multiplied in fp32 instead. The CPU multiplies 32 pairs of 16 bits at a time, and 16 of fp32, or 16 and 8.

They are operators of torch, so that what looks on as tensors are used, the rehearsal of an estimate, sees them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
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
VECTORS = SOURCE.with_name("integer_vectors.h")
FLAGS = ["-O3", "-mfma", "-fopenmp", "-shared", "-fPIC"]
FLAGS += ["-ffp-contract=off"]  # else some rows of a tile would be rounded once less than others
INSTRUCTIONS = {  # the faster ones first
    "AVX-512 VNNI": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vnni"],
    "AVX-VNNI": ["-mavx2", "-mf16c", "-mavxvnni"],
}
BLOCK, TILE_ROWS = 128, 8  # as in the source
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

OPERATORS = torch.library.Library("lorasmith", "DEF")
OPERATORS.define("quantize(Tensor x, Tensor(a!) codes, Tensor(b!) scales, Tensor(c!)? limits) -> ()")
OPERATORS.define(
    "integer_product(Tensor x, Tensor codes, Tensor scales, Tensor? limits, Tensor weight, Tensor(a!) out, *, "
    "bool sums_over_rows, bool add) -> ()"
)
# x (T, K), its codes and scales, and the limits above which they leave values out
Coded = tuple[Tensor, Tensor, Tensor, Tensor | None]


class NoIntegers(Exception):
    """Why this machine cannot compute these products."""


@cache
def library_or_reason() -> Any:
    """The compiled functions, or as a text why there are none."""
    try:
        compiler = shutil.which("gcc")
        if compiler is None:
            raise NoIntegers("there is no gcc")
        for instructions in INSTRUCTIONS:
            loaded = loaded_for(instructions, compiler)
            if loaded.supported():
                return loaded
        raise NoIntegers(f"the CPU has no {' or '.join(INSTRUCTIONS)}")
    except NoIntegers as reason:
        return str(reason)
    except (OSError, AttributeError, RuntimeError) as error:  # the last where there is no home
        return f"they cannot be compiled into the cache of this user, or not be loaded from there: {error}"


def loaded_for(instructions: str, compiler: str) -> Any:
    """The functions compiled for those instructions. Raises `NoIntegers`, `OSError`, `AttributeError`."""
    loaded = ctypes.CDLL(str(compiled(instructions, compiler)))
    loaded.quantize.restype = None
    return loaded


def library() -> Any:
    """The compiled functions. Raises `NoIntegers`."""
    found = library_or_reason()
    if isinstance(found, str):
        raise NoIntegers(found)
    return found


def why_no_integers() -> str | None:
    """None where this machine computes these products."""
    found = library_or_reason()
    return found if isinstance(found, str) else None


def compiled(instructions: str, compiler: str) -> Path:
    """The shared library of this source, machine and compiler, in the user's cache. Raises `NoIntegers`, `OSError`."""
    version = subprocess.run([compiler, "-dumpfullversion"], capture_output=True, text=True).stdout
    command = [compiler, *FLAGS, *INSTRUCTIONS[instructions], str(SOURCE), *openmp_of_torch(), "-Wl,--as-needed"]
    facts = SOURCE.read_bytes(), VECTORS.read_bytes(), command, version, platform.machine(), platform.libc_ver()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorasmith"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_owner(folder)
    path = folder / f"{SOURCE.stem}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            made = Path(own) / path.name
            run = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if run.returncode:
                raise NoIntegers(f"{compiler} cannot compile them: {' '.join(run.stderr.split())[:200]}")
            made.chmod(0o500)
            made.replace(path)  # whole at once, whoever else compiles it now
    check_owner(path)
    return path


def check_owner(path: Path) -> None:
    """What it holds is run, so nobody else may write it."""
    state = path.stat()
    if state.st_uid != os.getuid() or state.st_mode & 0o022:
        raise NoIntegers(f"others than this user may write {path}")


def openmp_of_torch() -> list[str]:
    """Its own copy, under whatever name: the threads of a second one would wait for those of the first, which spin."""
    folder = Path(torch.__file__).parent
    return [str(path) for place in ("lib", "../torch.libs") for path in sorted((folder / place).glob("libgomp*"))]


def coded(x: Tensor, workspace: Workspace, *, spare_outliers: bool = False) -> Coded:
    """x (T, K) in fp32 with its codes, in buffers that the next call overwrites; `spare_outliers` for activations."""
    rows = -(-len(x) // TILE_ROWS) * TILE_ROWS
    blocks = -(-x.shape[1] // BLOCK)
    codes = workspace.take("codes", blocks, rows, BLOCK, dtype=torch.int16)
    scales = workspace.take("scales", blocks, rows, dtype=torch.float32)
    limits = workspace.take("limits", blocks, rows, dtype=torch.float32) if spare_outliers else None
    torch.ops.lorasmith.quantize(x, codes, scales, limits)
    return x, codes, scales, limits


def integer_product(
    coded: Coded, weight: Tensor, out: Tensor, *, sums_over_rows: bool = False, add: bool = False
) -> None:
    """out (T, N) = x W^T for weight (N, K), or x W for weight (K, N) with `sums_over_rows`; `add`: to what out holds.

    Outliers are spared without `sums_over_rows` alone. weight is contiguous, in fp32, bf16 or fp16, out in fp32 with contiguous rows.
    """
    torch.ops.lorasmith.integer_product(*coded, weight, out, sums_over_rows=sums_over_rows, add=add)


@torch.library.impl(OPERATORS, "quantize", "CPU")
def quantize_on_cpu(x: Tensor, codes: Tensor, scales: Tensor, limits: Tensor | None) -> None:
    check_coded(x, codes, scales, limits)
    library().quantize(
        pointer(x),
        *longs(len(x), x.shape[1], x.stride(0)),
        pointer(codes),
        pointer(scales),
        pointer(limits) if limits is not None else None,
        torch.get_num_threads(),
    )


@torch.library.impl(OPERATORS, "integer_product", "CPU")
def multiply_on_cpu(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    limits: Tensor | None,
    weight: Tensor,
    out: Tensor,
    *,
    sums_over_rows: bool,
    add: bool,
) -> None:
    check_coded(x, codes, scales, limits)
    terms, outputs = weight.shape if sums_over_rows else reversed(weight.shape)
    check(limits is None or not sums_over_rows, "limits for sums over rows")
    check(x.shape[1] == terms, f"x of {x.shape[1]} columns for {terms} terms")
    check(out.shape == (len(x), outputs) and out.stride(1) == 1 and out.dtype == torch.float32, "out of another form")
    check(weight.is_contiguous() and weight.dtype in DTYPES, f"weights in {weight.dtype}, or not contiguous")
    if not out.numel():
        return
    failed = library().multiply(
        pointer(x),
        *longs(len(x), x.stride(0)),
        pointer(codes),
        pointer(scales),
        pointer(limits) if limits is not None else None,
        pointer(weight),
        DTYPES[weight.dtype],
        *longs(*weight.shape),
        int(sums_over_rows),
        pointer(out),
        *longs(out.stride(0)),
        int(add),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the panels of a product")


def check_coded(x: Tensor, codes: Tensor, scales: Tensor, limits: Tensor | None) -> None:
    check(x.dtype == torch.float32 and x.stride(1) == 1 and x.shape[1] > 0, "x has to be fp32 with contiguous rows")
    blocks, rows = -(-x.shape[1] // BLOCK), -(-len(x) // TILE_ROWS) * TILE_ROWS
    for tensor, dtype, shape in (
        (codes, torch.int16, (blocks, rows, BLOCK)),
        (scales, torch.float32, (blocks, rows)),
        (limits, torch.float32, (blocks, rows)),
    ):
        if tensor is None:
            continue
        check(tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous(), "codes of another form")


def check(holds: bool, what: str) -> None:
    """Before memory is read by address."""
    if not holds:
        raise ValueError(what)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def longs(*values: int) -> list[ctypes.c_long]:
    return [ctypes.c_long(value) for value in values]
