"""Jobs of the watchdog tests: ranks wait for one another while one of them fails."""

from __future__ import annotations

import os
import signal
import threading

import torch
from torch import distributed

from runtime.errors import DataError
from runtime.ranks import join
from runtime.watchdog import watch_ranks


def step_with_a_fault(fault: str, culprit: int, limit: float) -> None:
    """Two healthy steps, then `culprit` does not come to the third."""
    ranks, _ = join("cpu", limit)
    with watch_ranks(ranks, limit) as watchdog:
        for step in range(1, 4):
            watchdog.enter_phase("reading data", step)
            if step == 3 and ranks.rank == culprit:
                fail(fault)
            watchdog.enter_collective()
            distributed.all_reduce(torch.ones(1))


def fail(fault: str) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "error":
        raise DataError("shard-00007.tar is broken")
    elif fault == "bug":
        raise ZeroDivisionError("division by zero")
    assert fault in ("hung", "bug")
    threading.Event().wait()


def only_come(limit: float) -> None:
    """A rank that comes to the meeting, where another does not."""
    if os.environ["RANK"] == "1":
        os._exit(0)
    join("cpu", limit)


def all_leave(limit: float) -> None:
    """Every rank stops by the same error, as they do when the data is broken."""
    ranks, _ = join("cpu", limit)
    with watch_ranks(ranks, limit):
        raise DataError("all is broken")
