"""Processes that run one command after another. Each imports the libraries, which takes ten seconds, once.

Tested in tests/launch/ablation/test_ablation.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar

from launch.start.command import end_with_parent, error_with_code, print_heading

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of processes, used as a context manager. A call runs one command in an idle process; several threads may call it."""

    def __init__(self, count: int, run: Callable[[list[str]], int]) -> None:
        """Start the processes.

        Args:
            count: Number of processes.
            run: Runs a command's arguments and returns its exit code: `launch.cli.main`. Importable, as it is pickled.
        """
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all = [_Worker(run) for _ in range(count)]
        for worker in self._all:
            self._idle.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.commands.close()  # the process ends after its current command
        for worker in self._all:
            worker.process.join()

    def __call__(self, *command: str) -> None:
        """Wait for an idle process and run a command in it.

        Raises:
            LigatureError: The command failed; the error has its exit code.
        """
        worker = self._idle.get()
        try:
            code = worker.run(command)
        finally:
            self._idle.put(worker)
        if code:
            raise error_with_code(
                f"stopped in `ligature {' '.join(command)}` (exit code {code}); the same command resumes from there",
                # A negative code is the number of a signal, which a process cannot exit with.
                code if code > 0 else 1,
            )


def side_by_side(run: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> Iterator[Result]:
    """Yield `run` of each item, `jobs` at a time, in the items' order. After a failure nothing more starts."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(run, items)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Worker:
    """One process, and the pipe that its commands go through."""

    def __init__(self, run: Callable[[list[str]], int]) -> None:
        spawn = get_context("spawn")
        self.commands, remote = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(remote, os.getpid(), run))
        self.process.start()
        # The worker alone holds that end now, so its death shows here as the end of the pipe.
        remote.close()

    def run(self, command: tuple[str, ...]) -> int:
        """Return the command's exit code, or minus the number of the signal that ended the process."""
        try:
            self.commands.send(list(command))
            return int(self.commands.recv())
        except (EOFError, ConnectionError):
            self.process.join()
            return self.process.exitcode or 1


def _serve(commands: Connection, parent: int, run: Callable[[list[str]], int]) -> None:
    if request_signal := end_with_parent(parent):
        request_signal()
    while True:
        try:
            command = commands.recv()
        except (EOFError, KeyboardInterrupt):
            return
        print_heading(f"ligature {' '.join(command)}")
        code = run(command)
        try:
            commands.send(code)
        except ConnectionError:  # the process that sent the command has gone
            return
