"""Processes that run one `ligature` command after another: what every command imports (ten seconds) is imported once a process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVar

from launch.start.local import end_with_parent
from runtime.errors import LigatureError

Place = TypeVar("Place")
Found = TypeVar("Found")


class Workers:
    """Calling it runs a command in an idle process, waiting for one. Threads may call it; use it as a context."""

    def __init__(self, count: int) -> None:
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._all = [_Worker() for _ in range(count)]
        for worker in self._all:
            self._idle.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._all:
            worker.commands.close()  # it ends after the command that it is at
        for worker in self._all:
            worker.process.join()

    def __call__(self, *command: str) -> None:
        """Raises LigatureError, with the command's exit code, where it fails."""
        worker = self._idle.get()
        try:
            code = worker.run(command)
        finally:
            self._idle.put(worker)
        if code:
            error = LigatureError(
                f"stopped in `ligature {' '.join(command)}` (exit code {code}); the same command goes on from there"
            )
            error.exit_code = code if code > 0 else 1
            raise error


def side_by_side(run: Callable[[Place], Found], places: Iterable[Place], jobs: int) -> Iterator[Found]:
    """`run` of each place, `jobs` at a time, results in order. After a failure nothing more is begun."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(run, places)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Worker:
    def __init__(self) -> None:
        spawn = get_context("spawn")
        self.commands, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, os.getpid()))
        self.process.start()
        theirs.close()

    def run(self, command: tuple[str, ...]) -> int:
        """-> its exit code; negative: the signal that ended the process."""
        try:
            self.commands.send(list(command))
            return int(self.commands.recv())
        except (EOFError, ConnectionError):
            self.process.join()
            return self.process.exitcode or 1


def _serve(commands: Connection, parent: int) -> None:
    from launch.cli import main

    if ask := end_with_parent(parent):
        ask()
    while True:
        try:
            command = commands.recv()
        except (EOFError, KeyboardInterrupt):
            return
        print(f"\n== ligature {' '.join(command)}", flush=True)
        code = main(command)
        try:
            commands.send(code)
        except ConnectionError:  # whoever asked has gone
            return
