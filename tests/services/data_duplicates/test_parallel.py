"""Work over processes: in order, and with a clear end when the system takes one of them away."""

import operator
import signal

import pytest

from lorasmith.errors import Killed
from lorasmith.services.data_duplicates.parallel import TASKS_BEFORE_PROCESSES, Workers

MANY = 2 * TASKS_BEFORE_PROCESSES


def test_results_come_in_the_order_of_the_inputs() -> None:
    with Workers(2) as workers:
        assert list(workers.map(operator.neg, range(MANY))) == [-number for number in range(MANY)]


def test_a_worker_that_the_system_kills_is_an_error_with_a_way_out() -> None:
    with Workers(2) as workers, pytest.raises(Killed) as caught:
        list(workers.map(signal.raise_signal, [signal.SIGKILL] * MANY))
    assert caught.value.message == (
        "the system killed one of the 2 processes that hash and compare rows, most often because memory ran out; "
        "nothing was stored"
    )
    assert caught.value.hint is not None
    assert "taskset --cpu-list 0" in caught.value.hint
