"""A signal sets a flag, and the current step ends as usual."""

from __future__ import annotations

import os
import signal

import pytest

from runtime.interrupts import STOPPING, watch_interrupts


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_is_remembered_and_interrupts_nothing(number):
    with watch_interrupts() as interrupts:
        assert interrupts.received is None
        os.kill(os.getpid(), number)
        assert interrupts.received is number


def test_the_first_of_several_is_remembered():
    with watch_interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.received is signal.SIGUSR1


def test_a_single_rank_decides_alone():
    with watch_interrupts() as interrupts:
        assert interrupts.received_on_any_rank() is False
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.received_on_any_rank() is True


def test_the_previous_handlers_come_back():
    before = [signal.getsignal(number) for number in STOPPING]
    with pytest.raises(ZeroDivisionError), watch_interrupts():
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in STOPPING] == before
