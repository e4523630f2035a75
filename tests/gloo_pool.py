"""Processes joined by gloo that live as long as the test session, for cheap tests of what happens across ranks.

`pool.run(function, *arguments)` calls the function on every rank and returns the results in rank order. The function is
sent by reference, so it must stand at the top of a module. An exception in any rank fails the test with that rank's
traceback; the pool then starts afresh, as its ranks may no longer agree on what comes next.

The processes are forked from a server that has imported torch and DeepSpeed once: a start costs a fork, not an import.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection, forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.utils.tensorboard",
    "timm",
    "deepspeed",
    "pretrain.engine",
    "pretrain.train",
]
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "DEEPSPEED_LOG_LEVEL": "warning", "OMP_NUM_THREADS": "1"}
GRACE = 3.0
"""Seconds that the other ranks have to end after one of them failed: they may wait for it in a collective for ever."""


class RankFailed(Exception):
    """A function raised, died or hung on some rank."""


class GlooPool:
    """`world` processes in one gloo group, started on first use."""

    def __init__(self, world: int = 2, timeout: float = 600.0) -> None:
        self.world, self.timeout = world, timeout
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: Path | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """Call `function(*arguments, **named)` on every rank. -> the results, by rank. Raises RankFailed."""
        if not self._processes:
            self._start()
        order = pickle.dumps((sys.path, pickle.dumps((function, arguments, named))))
        for pipe in self._pipes:
            pipe.send_bytes(order)
        replies = self._collect()
        if wrong := {rank: reply for rank, (fine, reply) in replies.items() if not fine}:
            self.close()
            tracebacks = "\n".join(
                f"--- rank {rank} of {self.world} ---\n{reply}" for rank, reply in sorted(wrong.items())
            )
            raise RankFailed(f"{getattr(function, '__name__', function)} failed\n{tracebacks}")
        return [replies[rank][1] for rank in range(self.world)]

    def close(self) -> None:
        """End the processes; a later `run` starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        if self._folder:
            shutil.rmtree(self._folder, ignore_errors=True)

    def start_server(self) -> None:
        """The server that processes are forked from, if it does not run yet."""
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
        before = {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)
        try:
            forkserver.ensure_running()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def _start(self) -> None:
        self.start_server()
        context = multiprocessing.get_context("forkserver")
        self._folder = Path(tempfile.mkdtemp(prefix="gloo-pool-"))
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world, str(self._folder / "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _collect(self) -> dict[int, tuple[bool, Any]]:
        """rank -> (whether it went well, result or traceback)."""
        replies: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + self.timeout
        while len(replies) < self.world:
            waiting = {self._pipes[rank]: rank for rank in range(self.world) if rank not in replies}
            ready = connection.wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                replies |= {rank: (False, "no answer in time") for rank in waiting.values()}
            for pipe in ready:
                try:
                    reply = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    reply = (False, "the process died")
                replies[waiting[pipe]] = reply
                if not reply[0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return replies


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    """A rank's life: join the group, then answer one order after another until the pipe closes."""
    os.environ |= ENVIRONMENT
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(minutes=15)
    )
    while True:
        try:
            path, order = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the session is over; threads of gloo need not be asked
        try:
            sys.path[:] = path
            function, arguments, named = pickle.loads(order)
            reply = pickle.dumps((True, function(*arguments, **named)))
        except BaseException:
            reply = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(reply)
