from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from lorasmith.interrupts import between_interrupts


class PressesCtrlC:
    """Formatted, as in the middle of what a library does for an item."""

    def __init__(self, times: int = 1) -> None:
        self.times = times

    def __str__(self) -> str:
        for _ in range(self.times):
            signal.raise_signal(signal.SIGINT)
        return "pressed"


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_the_item_in_which_ctrl_c_is_pressed_is_ended_before_it_raises() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        for item in between_interrupts([0, PressesCtrlC(), 2]):
            done.append(str(item))
    assert done == ["0", "pressed"]


def test_a_second_press_raises_at_once() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        for item in between_interrupts([0, PressesCtrlC(2)]):
            done.append(str(item))
    assert done == ["0"]


def test_a_press_while_the_last_item_is_looked_for_is_not_lost() -> None:
    def items() -> Iterator[int]:
        yield 0
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        list(between_interrupts(items()))


def test_a_loop_that_is_left_gives_the_handler_back() -> None:
    for item in between_interrupts(range(5)):
        if item == 2:
            break
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_who_handles_the_signal_already_goes_on_to() -> None:
    heard = []
    signal.signal(signal.SIGINT, lambda *_: heard.append("signal"))
    assert [str(item) for item in between_interrupts([PressesCtrlC(), 1])] == ["pressed", "1"]
    assert heard == ["signal"]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_loop_in_a_loop_leaves_it_to_the_outer_one() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt):
        for outer in between_interrupts("ab"):
            done.append([outer + str(inner) for inner in between_interrupts([PressesCtrlC(), 1])])
    assert done == [["apressed", "a1"]]


def test_a_thread_takes_no_signals() -> None:
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.extend(between_interrupts(range(3))))
    thread.start()
    thread.join()
    assert done == [0, 1, 2]
