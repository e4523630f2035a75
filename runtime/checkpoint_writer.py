"""Write checkpoints in a thread. Training waits for the copy to host memory and for nothing else."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from runtime.errors import LigatureError

if TYPE_CHECKING:
    from torch import Tensor

Write = Callable[[], bool]
"""Writes a checkpoint and returns whether it was saved. It has reported the reason where it returns False."""


def host_copies(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Copy tensors into host memory, where training cannot change them any more.

    Args:
        tensors: names and tensors. Gathering them is a collective, so every rank must iterate over all of them.
        keep: whether this rank keeps the copies; the others return an empty dictionary.
    """
    import torch

    copies = {}
    for name, tensor in tensors:
        if keep:
            # Without `copy`, a tensor that lies on the CPU already would be shared with training.
            copies[name] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies


class CheckpointWriter:
    """Runs one write at a time in a thread. Every rank has a writer, but only the first rank gives it something to write."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._saved = True
        self._error: BaseException | None = None

    def start(self, write: Write | None) -> None:
        """Begin a write; None begins none. `finish` must have ended the previous write."""
        assert self._thread is None, "finish comes before start"
        if write is not None:
            # A process would need a second copy. Hashing and writing, the long part, release the interpreter's lock.
            self._thread = threading.Thread(target=self._run, args=(write,), name="checkpoint", daemon=True)
            self._thread.start()

    def _run(self, write: Write) -> None:
        try:
            self._saved = write()
        except BaseException as error:  # raised again on the training thread
            self._error = error

    def check(self) -> None:
        """Raise the error that ended a write, if there is one, without waiting for a write that is still running.

        A full disk is no such error: the write then returns False. Errors here are a lost lease or a bug.
        """
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> bool:
        """Wait for the running write, if any. Return False where it has not saved its checkpoint."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
        saved, self._saved = self._saved, True
        return saved

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        """Let the running write end. An error that is already propagating must not be hidden by one from here."""
        try:
            self.finish()
        except Exception as write_error:
            if error is None:
                raise
            reason = str(write_error) if isinstance(write_error, LigatureError) else repr(write_error)
            print(f"ligature: the last checkpoint was not written: {reason}", file=sys.stderr)
