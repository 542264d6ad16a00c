"""What a step would take from the heap: its own code runs, its tensors are allocated, and nothing is computed.

Memory that nobody touches costs nothing, so a step of any size can be rehearsed on any machine. Holes that growing buffers
leave in the heap, masks, temporaries: whatever the allocator would do, it does here.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lorasmith.engine.models.workspace import Workspace, retain_heap
from lorasmith.errors import JobFailed

Prepare = Callable[[], Callable[[], None]]

TOP_PAD = -2  # of mallopt; see malloc.h of glibc
NO_RESERVE = 0x4000  # mmap(2): larger than the machine's memory, as nothing is touched; Python 3.13 has a name for it
MOST_LAYERS = 48  # that are rehearsed; each takes some hundred microseconds an operation
SAMPLED_BYTES = 1 << 12  # smaller tensors do not move the peak


class Unperformed(TorchDispatchMode):
    """Floating-point operations only allocate what they return; integers are computed, as lengths depend on them.

    A view is made. An operation that writes into a tensor returns it as it is. A number read from a tensor is 1.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.process = os.open("/proc/self/statm", os.O_RDONLY)
        self.peak_bytes = self.data_bytes()
        self.known: dict[Any, Any] = {}  # what an operation returned for such arguments: working it out costs most

    def data_bytes(self) -> int:
        """Private memory that is mapped, touched or not: heap and anonymous maps (proc(5), statm)."""
        return int(os.pread(self.process, 128, 0).split()[5]) * os.sysconf("SC_PAGESIZE")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args) if not args[0].is_floating_point() else 1.0
        facts = facts_of(func)
        if facts.is_composite:  # reaches here whole in inference mode
            with self:
                return func.decompose(*args, **kwargs)
        if facts.written:
            written = [args[place] if place < len(args) else kwargs[name] for place, name in facts.written]
            if not any_floating(written):
                return func(*args, **kwargs)
            return written[0] if facts.returns == 1 else tuple(written) if facts.returns else None
        if facts.is_view:
            return func(*args, **kwargs)
        if facts.is_indexing:
            args = (args[0], integer_indices(args[1]), *args[2:])
        key = (func, signature(args), signature(kwargs))
        if key not in self.known:
            self.known[key] = self.outcome(func, args, kwargs)
        shapes = self.known[key]
        if shapes is None:
            return func(*args, **kwargs)
        return mapped(self.allocate, shapes)

    def outcome(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Shapes of what comes back, as tensors without data; None where integers are to be computed."""
        meta_kwargs = dict(kwargs)
        if "device" in kwargs or not any(isinstance(value, Tensor) for value in flat((args, kwargs))):
            meta_kwargs["device"] = "meta"
        floating = any_floating((args, kwargs))
        like, back = shape_only, unchanged
        if func is torch.ops.aten._grouped_mm.default:  # shapes are known in bf16 alone, and computed in any type
            like, back = shape_in_bf16, partial(in_dtype, args[0].dtype)
        try:
            found = mapped(back, func(*mapped(like, args), **mapped(like, meta_kwargs)))
        except (NotImplementedError, RuntimeError, TypeError):
            if floating:
                raise
            return None
        return found if floating or any_floating(found) else None

    def allocate(self, shape: Any) -> Any:
        if not isinstance(shape, Tensor):
            return shape
        made = torch.empty_strided(shape.size(), shape.stride(), dtype=shape.dtype, device="cpu")
        if made.nbytes >= SAMPLED_BYTES:
            self.peak_bytes = max(self.peak_bytes, self.data_bytes())
        return made


@dataclass(frozen=True)
class Facts:
    """What an operation does with its arguments; `written` are places and names."""

    written: list[tuple[int, str]]
    is_composite: bool
    is_view: bool
    is_indexing: bool
    returns: int


@cache
def facts_of(func: Any) -> Facts:
    schema = func._schema
    written = [
        (len(schema.arguments) if argument.kwarg_only else place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    is_view = any(value.alias_info is not None for value in schema.returns)
    return Facts(written, is_composite, is_view, schema.name in ("aten::index", "aten::index_put"), len(schema.returns))


def flat(values: Any) -> Iterator[Any]:
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from flat(value)
    elif isinstance(values, dict):
        yield from flat(list(values.values()))
    else:
        yield values


def mapped(change: Callable[[Any], Any], values: Any) -> Any:
    """`change` of each leaf of lists, tuples and dictionaries."""
    if isinstance(values, dict):
        return {key: mapped(change, value) for key, value in values.items()}
    return (
        type(values)(mapped(change, value) for value in values) if isinstance(values, (list, tuple)) else change(values)
    )


def signature(values: Any) -> Any:
    """What the shape of an outcome can depend on, hashable."""
    if isinstance(values, Tensor):
        return values.shape, None if values.is_mkldnn else values.stride(), values.dtype, values.is_meta
    if isinstance(values, (list, tuple)):
        return tuple(signature(value) for value in values)
    if isinstance(values, dict):
        return tuple((name, signature(value)) for name, value in values.items())
    return type(values), values


def any_floating(values: Any) -> bool:
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in flat(values))


def shape_only(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    if value.is_mkldnn:  # packed
        return torch.empty(value.size(), dtype=value.dtype, device="meta")
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")


def shape_in_bf16(value: Any) -> Any:
    return in_dtype(torch.bfloat16, shape_only(value))


def in_dtype(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def unchanged(value: Any) -> Any:
    return value


def integer_indices(indices: Any) -> list[Any]:
    """How many elements a mask takes decides a shape, so where it is true is computed."""
    found: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, Tensor) and index.dtype == torch.bool
        found += index.nonzero().unbind(1) if is_mask else [index]
    return found


def heap_growth(prepare: Prepare, *, retained: bool) -> int:
    """The most bytes that private memory grows by while what `prepare` returns runs, in a copy of this process.

    `retained`: the heap is set up as for the packed decoder. The copy starts no threads. Raises `JobFailed`.
    """
    return started(prepare, retained=retained)()


def started(prepare: Prepare, *, retained: bool) -> Callable[[], int]:
    """`heap_growth` that goes on in the background; what comes back waits for it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            answer: dict[str, Any] = {"bytes": grown(prepare, retained=retained)}
            status = 0
        except BaseException as error:
            traceback.print_exc()  # into log.txt
            answer = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(status)
    os.close(write)
    return partial(awaited, child, read)


def awaited(child: int, read: int) -> int:
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    answer = json.loads(text) if text else {"error": "its process was killed"}
    if "error" in answer:
        raise JobFailed(f"the memory of a step could not be rehearsed: {answer['error']}", code="rehearsal")
    return int(answer["bytes"])


def set_top_pad(size_bytes: int) -> None:
    try:
        ctypes.CDLL("libc.so.6").mallopt(TOP_PAD, size_bytes)
    except (OSError, AttributeError):
        return  # another C library, see `retain_heap`


def grown(prepare: Prepare, *, retained: bool) -> int:
    torch.set_num_threads(1)
    if retained:
        retain_heap()
    set_top_pad(0)  # what is padded is not touched in a real run
    Workspace.mapping |= NO_RESERVE
    rehearse = prepare()
    with Unperformed():
        torch.nn.functional.gelu(torch.ones(2, 2) @ torch.ones(2, 2)).sum()  # torch loads what works out shapes
    with Unperformed() as mode:
        before = mode.data_bytes()
        rehearse()
    return int(max(0, mode.peak_bytes - before))


def whole_growth(prepare: Callable[[int], Prepare], layers: int, *, retained: bool) -> Callable[[], int]:
    """Growth with that many layers, in the background: of all of them, or of many from two numbers of them in a line.

    Few layers do not tell: they fit into the holes that a validation leaves.
    """
    whole = started(prepare(min(layers, MOST_LAYERS)), retained=retained)
    if layers <= MOST_LAYERS:
        return whole
    half = started(prepare(MOST_LAYERS // 2), retained=retained)

    def extended() -> int:
        large, small = whole(), half()
        return large + math.ceil((layers - MOST_LAYERS) * (large - small) / (MOST_LAYERS - MOST_LAYERS // 2))

    return extended
