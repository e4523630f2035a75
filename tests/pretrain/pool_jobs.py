"""Jobs that each rank of the pool tests runs."""

from __future__ import annotations

import os

import torch
from torch import distributed


def rank_and_sum(value: int) -> tuple[int, int]:
    total = torch.tensor(value * (distributed.get_rank() + 1))
    distributed.all_reduce(total)
    return distributed.get_rank(), int(total)


def process_id() -> int:
    return os.getpid()


def fail_on(rank: int) -> None:
    if distributed.get_rank() == rank:
        raise ZeroDivisionError("on purpose")


def die_on(rank: int) -> None:
    if distributed.get_rank() == rank:
        os._exit(3)
