"""bitsandbytes, which PEFT imports wherever it is installed, and with it torch's compiler: a fifth of an engine's start.

Some optimizers need it, and 4 bits on a GPU. Until then it is as if it were not installed: `None` is how the import system says that.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from typing import Any


def hide_bitsandbytes() -> None:
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def show_bitsandbytes() -> None:
    if sys.modules.get("bitsandbytes", sys) is None:
        del sys.modules["bitsandbytes"]


@cache
def bitsandbytes_dequantize() -> Callable[..., Any] | None:
    """Its `dequantize_4bit`, for weights on a GPU; None where it is not installed."""
    show_bitsandbytes()
    try:
        function: Callable[..., Any] = importlib.import_module("bitsandbytes.functional").dequantize_4bit
    except ImportError:
        return None
    return function
