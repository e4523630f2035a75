"""Several processes of one stage on this machine: `ligature launch local --nproc 2 pretrain --config …`."""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

from runtime.errors import LigatureError, RecipeError
from runtime.recipe import OptionParser

STAGES = ("pretrain", "finetune", "evaluate", "index")
PR_SET_PDEATHSIG = 1
GRACE = 30.0
"""Seconds the other ranks have to stop after one has failed."""


def launch(arguments: list[str]) -> None:
    """Start the ranks, pass signals on to them, and stop them all when one fails. Raises LigatureError with the first failure's code."""
    parser = OptionParser("ligature launch", description="Run a stage on several processes.")
    parser.add_argument("where", choices=["local"])
    parser.add_argument("--nproc", type=int, default=2, help="processes (default 2)")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the stage's own")
    options = parser.parse_args(arguments)
    if options.nproc < 1:
        raise RecipeError(f"--nproc is {options.nproc}; it is a number of processes, 1 or more")
    from launch.cli import read_stage
    from pretrain.config import divide_batch

    recipe = read_stage(options.stage, options.arguments)  # a mistake is answered before anything starts
    if options.stage == "pretrain":
        divide_batch(recipe.training.global_batch, recipe.training.micro_batch, options.nproc)
    check_gpus(getattr(recipe, "device", "") or recipe.training.device, options.nproc)
    code = run_ranks([sys.executable, "-m", "launch.cli", options.stage, *options.arguments], options.nproc)
    if code:
        error = LigatureError(f"{options.stage} stopped with exit code {code}; its own line is above")
        error.exit_code = code
        raise error


def check_gpus(device: str, count: int) -> None:
    """Refuse more ranks than this machine has GPUs where they are to run on them."""
    if device == "cpu" or not shutil.which("nvidia-smi"):
        return
    import torch  # two seconds

    if 0 < (gpus := torch.cuda.device_count()) < count:
        raise RecipeError(f"--nproc is {count}, but torch sees {gpus} GPUs here; start one rank a GPU, or on the CPU")


def run_ranks(
    command: list[str], count: int, first: int = 0, world: int | None = None, address: str = "127.0.0.1", port: int = 0
) -> int:
    """Run `command` as `count` ranks -> 0, or the exit code of the first one that failed.

    first, world, address, port: where these are a part of `world` ranks, from rank `first` on, that meet elsewhere.
    """
    shared = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port or free_port()),
        "WORLD_SIZE": str(world or count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    ranks: list[subprocess.Popen] = []

    def forward(number: int, frame: object) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    # Before anything starts: a signal that came in between would leave the ranks without a parent.
    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        for rank in range(count):
            own = {"RANK": str(first + rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    command,
                    env=os.environ | shared | own,
                    start_new_session=True,
                    preexec_fn=end_with_parent(os.getpid()),
                )
            )
        return wait_for(ranks, GRACE)
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def wait_for(processes: list[subprocess.Popen], grace: float) -> int:
    """Until all have ended, or one has failed and the others have had `grace` seconds. -> 0, or the code of the first failure."""
    failed, since = 0, 0.0
    while None in (codes := [process.poll() for process in processes]):  # every one is asked, whichever still runs
        if not failed and any(codes):
            failed, since = next(code for code in codes if code), time.monotonic()
        if failed and time.monotonic() - since >= grace:
            break
        time.sleep(0.1)
    failed = failed or next((code for code in codes if code), 0)
    return failed if failed >= 0 else 128 - failed


def end_with_parent(parent: int) -> Callable[[], None] | None:
    """What a started process does first (Linux): ask for SIGTERM when `parent` is gone, even by kill -9, so that no rank runs
    on without its launcher. A stage then saves at its step boundary and leaves; other processes end."""
    if sys.platform != "linux":
        return None
    set_signal = ctypes.CDLL(None, use_errno=True).prctl  # found before the fork: little is safe after it

    def ask() -> None:
        if set_signal(PR_SET_PDEATHSIG, signal.SIGTERM) != 0 or os.getppid() != parent:
            os._exit(1)

    return ask


def free_port() -> int:
    """A TCP port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
