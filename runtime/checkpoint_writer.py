"""Checkpoints are written in a thread: training waits for the copy to host memory, and for nothing else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from runtime.errors import LigatureError

if TYPE_CHECKING:
    from torch import Tensor

Write = Callable[[], bool]
"""-> whether the checkpoint stands; where not, it has been said why."""


def host_copies(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Copies in host memory that training cannot change any more; none where they are not to be kept (gathering `tensors` is
    a collective, so every rank must walk them)."""
    import torch

    copies = {}
    for name, tensor in tensors:
        if keep:
            copies[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies


class CheckpointWriter:
    """One write at a time, in a thread of the first rank. The other ranks have one, too, with nothing to write."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._stands = True
        self._error: BaseException | None = None

    def start(self, write: Write | None) -> None:
        """Begin to write. The write before must have been finished."""
        assert self._thread is None, "finish comes before start"
        if write is not None:
            self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
            self._thread.start()

    def _run(self, write: Write) -> None:
        try:
            self._stands = write()
        except BaseException as error:  # raised again on the training thread
            self._error = error

    def check(self) -> None:
        """Raise what has stopped a write for good (another process has taken the run over; a fault of ours), without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> bool:
        """Wait for the write under way, if any. -> False where it has not left a checkpoint that stands."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
        stands, self._stands = self._stands, True
        return stands

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Let the write under way end. Where an error is on its way up, nothing that goes wrong here may hide it."""
        try:
            self.finish()
        except Exception as fault:
            if error is None:
                raise
            told = str(fault) if isinstance(fault, LigatureError) else repr(fault)
            print(f"ligature: the last checkpoint was not written: {told}", file=sys.stderr)
