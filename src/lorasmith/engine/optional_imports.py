"""bitsandbytes, which PEFT imports wherever it is installed, and with it torch's compiler: a fifth of an engine's start.

One optimizer needs it. Until then it is as if it were not installed: `None` is how the import system says that.
"""

from __future__ import annotations

import sys


def hide_bitsandbytes() -> None:
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]


def show_bitsandbytes() -> None:
    if sys.modules.get("bitsandbytes", sys) is None:
        del sys.modules["bitsandbytes"]
