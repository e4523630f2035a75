"""Ranks that may die: processes of one run, forked from the pool's server, each with its own exit code and its own log.

`GlooPool` fails a test when a rank ends; here the end of a rank is what is tested.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from gloo_pool import ENVIRONMENT, GlooPool

from launch.start.local import free_port
from runtime.errors import LigatureError

PATIENCE = 900.0
"""Seconds until a rank that should have ended is a failure of the test, and killed."""


@dataclass
class RankProcesses:
    processes: list[BaseProcess]
    logs: list[Path]

    def pid(self, rank: int) -> int:
        return self.processes[rank].pid or 0

    def wait(self) -> tuple[list[int | None], list[str]]:
        """-> exit codes and what was written to stderr and stdout, by rank."""
        for process in self.processes:
            process.join(PATIENCE)
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes, [log.read_text() for log in self.logs]


def start_ranks(folder: Path, world: int, function: Callable[..., Any], *arguments: Any) -> RankProcesses:
    """`function(*arguments)` on every rank, its environment set as a launcher sets it."""
    GlooPool(world).start_server()
    context = get_context("forkserver")
    folder.mkdir(parents=True, exist_ok=True)
    port, order = free_port(), pickle.dumps((sys.path, pickle.dumps((function, arguments))))
    logs = [folder / f"rank-{rank}.log" for rank in range(world)]
    processes = [context.Process(target=_run, args=(rank, world, port, log, order)) for rank, log in enumerate(logs)]
    for process in processes:
        process.start()
    return RankProcesses(list(processes), logs)


def _run(rank: int, world: int, port: int, log: Path, order: bytes) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= ENVIRONMENT | {name: str(value) for name, value in own.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
    import torch

    torch.set_num_threads(1)
    path, inner = pickle.loads(order)
    sys.path[:] = path
    function, arguments = pickle.loads(inner)
    code = 0
    try:
        function(*arguments)
    except LigatureError as error:
        print(f"ligature: {error}", file=sys.stderr)
        code = error.exit_code
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
