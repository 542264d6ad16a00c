"""Ctrl-C between the items of a long loop, and not in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


def between_interrupts(items: Iterable[T]) -> Iterator[T]:
    """The items. Ctrl-C raises `KeyboardInterrupt` once the loop is done with the one that it has; a second one at once.

    Else Python raises it wherever it is, and inside of pydantic it comes out as an error of the row.
    """
    with held() as asked:
        for item in items:
            yield item
            if asked():
                break
        if asked():
            raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed. Where it does something else than to raise, or signals go to another thread, it does that still."""
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            signal.default_int_handler(number, frame)
        pressed = True

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
