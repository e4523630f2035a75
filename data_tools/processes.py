"""Spread work over several processes of one machine, which die with the process that started them.

Tested in tests/data_tools/making/test_writer.py.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from runtime.errors import LigatureError

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Call a function on each task, and yield (task, result) as each is ready, in any order.

    A caller that stops early waits for the tasks under way.

    Args:
        function: A module's function, which worker processes can import.
        tasks: Its arguments.
        workers: Number of processes; 0: one per core; 1: this process alone. With several, the caller's main module must be
            importable (`if __name__ == "__main__":`).

    Raises:
        LigatureError: A worker process died.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(workers or cores, len(tasks))
    if workers <= 1:
        yield from ((task, function(task)) for task in tasks)
        return
    # Spawned, not forked: the caller may have threads (torch, pyarrow), and a fork would copy the locks they hold.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        futures = {pool.submit(function, task): task for task in tasks}
        for future in as_completed(futures):
            # Popped, so that the results of finished tasks do not pile up here.
            yield futures.pop(future), future.result()
    except BrokenProcessPool:
        raise LigatureError(
            "a worker process died (out of memory?); finished shards are kept, run it again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and exit when it dies. The pool of a killed parent would wait for work forever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
