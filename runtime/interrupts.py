"""Signals ask a run to stop; it stops at its next step boundary. Nothing is saved inside a handler."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupts:
    """Remembers the first signal that asked this process to stop; further ones change nothing."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> dict[signal.Signals, object]:
        """Take the stopping signals from here on. -> the handlers that had them."""
        return {number: signal.signal(number, self._remember) for number in STOPPING}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            if os.environ.get("RANK", "0") == "0":
                # A handler may run in the middle of a print: it writes to the descriptor, past Python's buffers.
                os.write(2, f"ligature: {self.received.name} received; stopping at the next step boundary\n".encode())

    def received_on_any_rank(self) -> bool:
        """Whether any rank was asked to stop: all ranks get the same answer, so they stop at the same step."""
        from runtime.ranks import any_rank

        return any_rank(self.received is not None)


_of_this_process: Interrupts | None = None


def hold_interrupts() -> None:
    """From here to the end of this process signals only ask it to stop: for a command whose stage saves and leaves by itself.

    Without it a second signal, while the exit code is on its way, would end the process with a code of its own.
    """
    global _of_this_process
    _of_this_process = Interrupts()
    _of_this_process.install()


@contextmanager
def watch_interrupts() -> Iterator[Interrupts]:
    """Turn SIGTERM, SIGINT and SIGUSR1 into a flag while the block runs, or for good where `hold_interrupts` was called."""
    if _of_this_process is not None:
        yield _of_this_process
        return
    interrupts = Interrupts()
    previous = interrupts.install()
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
