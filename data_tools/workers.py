"""Loader workers: how the processes that read and decode samples start, end and report errors.

The training stream, collections and galleries open their loaders here, so every worker behaves alike.
Tested in tests/data_tools/stream/test_stream_processes.py.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from runtime.errors import DataError


def open_loader(dataset: Dataset, collate: Callable[[list], Any], workers: int, **options: Any) -> DataLoader:
    """Return a torch loader over a dataset.

    Args:
        dataset: Must be safe to share with forked processes.
        collate: Turns the examples of a batch into one value.
        workers: Processes to fork; 0 reads in this process.
        options: Further arguments of torch's `DataLoader`, such as `batch_size` or `batch_sampler`.
    """
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # without one, torch draws from the global generator and shifts every later draw
        **options,
    )


def raise_errors(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of a loader, and raise the first one that is a `DataError`.

    Workers return errors instead of raising them, because torch wraps a raised error in a traceback of its own.
    """
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def start_worker(worker: int) -> None:
    """Prepare a new loader worker: it leaves signals to the training process and decodes on one thread.

    A terminal's Ctrl-C, and a SIGTERM from a launcher or SLURM, reach the workers too. A worker that died of one would
    end the run in an error before the run has saved.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Blocked, because only a thread that waits for the signal learns who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    # The library's threads do not survive a fork, and it would warn about that in every worker.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _end_with_parent(parent: int) -> None:
    """End this process at a SIGTERM that its parent sends, or that arrives after the parent's death.

    At its exit the training process sends SIGTERM to its workers and waits for them.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent == os.getppid():
        pass
    os._exit(0)
