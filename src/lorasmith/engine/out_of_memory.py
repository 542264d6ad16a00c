"""Whether an error means that memory ran out: each library says it in its own words."""

from __future__ import annotations

PHRASES = (
    "out of memory",  # CUDA
    "cublas_status_alloc_failed",  # its products, which ask for memory of their own
    "can't allocate memory",  # torch on a CPU
    "cannot allocate memory",  # the system, for a mapping
    "bad_alloc",
    "could not create a memory",  # oneDNN, as the next two
    "could not create a primitive",
    "could not execute a primitive",
)


def ran_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(phrase in text for phrase in PHRASES)
