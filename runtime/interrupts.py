"""A signal asks a run to stop, and the run stops at its next step boundary. No handler saves anything."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interrupts:
    """Remembers the first signal that asked this process to stop. Later signals change nothing."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def install(self) -> dict[signal.Signals, object]:
        """Handle the stopping signals from here on, and return the handlers they had before."""
        return {number: signal.signal(number, self._remember) for number in STOPPING}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            if os.environ.get("RANK", "0") == "0":
                # A handler may run in the middle of a print, so it bypasses Python's buffers and writes to the descriptor.
                os.write(2, f"ligature: {self.received.name} received; stopping at the next step boundary\n".encode())

    def received_on_any_rank(self) -> bool:
        """Return whether any rank was asked to stop. All ranks get the same answer, so they stop at the same step. A collective."""
        from runtime.ranks import any_rank

        return any_rank(self.received is not None)


_held: Interrupts | None = None
"""Set by `hold_interrupts` for the rest of this process."""


def hold_interrupts() -> None:
    """Let signals only ask this process to stop, until it ends. Meant for commands that save and exit by themselves.

    Without it, a second signal could replace the exit code of a stage that is already on its way out.
    """
    global _held
    _held = Interrupts()
    _held.install()


@contextmanager
def watch_interrupts() -> Iterator[Interrupts]:
    """Turn SIGTERM, SIGINT and SIGUSR1 into a flag while the block runs, or for good after `hold_interrupts`."""
    if _held is not None:
        yield _held
        return
    interrupts = Interrupts()
    previous = interrupts.install()
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
