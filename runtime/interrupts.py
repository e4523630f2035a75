"""Signals ask a run to stop; it stops at its next step boundary. Nothing is saved inside a handler."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupts:
    """Remembers the first signal that asked this process to stop."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop: all ranks get the same answer, so they stop at the same step."""
        import torch

        from runtime.ranks import sum_over_ranks

        device = "cuda" if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl" else "cpu"
        return bool(sum_over_ranks(torch.tensor([int(self.received is not None)], device=device)).item())


@contextmanager
def watch_interrupts() -> Iterator[Interrupts]:
    """Turn SIGTERM, SIGINT and SIGUSR1 into a flag while the block runs."""
    interrupts = Interrupts()
    previous = {number: signal.signal(number, interrupts._remember) for number in STOPPING}
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
