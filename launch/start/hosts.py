"""Ranks on several machines without SLURM, over ssh: `ligature launch hosts --hostfile hosts.txt pretrain --config …`.

The machines see the same folders under the same names and let ssh in without a password. One process on each, started through
ssh, starts that machine's ranks; it listens to its standard input, so that it knows when it is asked to stop, and when the
connection, or whoever launched it, is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from launch.start.local import GRACE, STAGES, run_ranks, wait_for
from runtime.errors import LigatureError, RecipeError
from runtime.recipe import OptionParser

CARRIED = (
    "PYTHONPATH",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
    "NCCL_SOCKET_IFNAME",
    "GLOO_SOCKET_IFNAME",
    "DS_ACCELERATOR",
)
"""Variables that the ranks get from here: ssh passes none on."""
STOP = b"stop\n"


@dataclass(frozen=True)
class Host:
    """A machine, and how many ranks it takes."""

    name: str
    slots: int


def launch_hosts(arguments: list[str]) -> None:
    """Run a stage on the machines of a hostfile. Raises LigatureError with the first failure's code."""
    parser = OptionParser("ligature launch hosts", description="Run a stage on several machines, over ssh.")
    parser.add_argument("--hostfile", type=Path, required=True, help="a machine a line: `node1 slots=8`")
    parser.add_argument(
        "--port", type=int, help="where the ranks meet, on the first machine (default: one from 20000 to 32000)"
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the stage's own")
    options = parser.parse_args(arguments)
    hosts = read_hosts(options.hostfile)
    world = sum(host.slots for host in hosts)
    from launch.cli import read_stage
    from pretrain.config import divide_batch

    recipe = read_stage(options.stage, options.arguments)  # a mistake is answered before anything starts
    if options.stage in ("pretrain", "finetune"):
        divide_batch(recipe.training.global_batch, getattr(recipe.training, "micro_batch", 1), world)
    if not shutil.which("ssh"):
        raise LigatureError("no ssh on this machine; install a client, or use `ligature launch local`")
    command = [sys.executable, "-m", "launch.cli", options.stage, *options.arguments]
    code = run_hosts(hosts, command, options.port or 20000 + os.getpid() * 7 % 12000)
    if code:
        error = LigatureError(f"{options.stage} stopped with exit code {code}; its own line is above")
        error.exit_code = code
        raise error


def read_hosts(path: Path) -> list[Host]:
    """The machines of a hostfile, as MPI and DeepSpeed write it: `name slots=8`, one slot where none are stated, # comments."""
    if not path.is_file():
        raise RecipeError(f"--hostfile {path}: no such file; it holds a machine a line: node1 slots=8")
    hosts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not (words := line.partition("#")[0].split()):
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 else "1"
        if len(words) > 2 or not slots.isdigit() or not int(slots) or words[0].startswith("-"):
            raise RecipeError(f"{path}, line {number}: {line.strip()!r} is no machine; write: node1 slots=8")
        hosts.append(Host(words[0], int(slots)))
    if not hosts:
        raise RecipeError(f"{path} names no machine; write one a line: node1 slots=8")
    if len({host.name for host in hosts}) < len(hosts):
        raise RecipeError(f"{path} names a machine twice; state all its ranks in one line: node1 slots=8")
    return hosts


def run_hosts(hosts: list[Host], command: list[str], port: int) -> int:
    """Run `command` as one rank a slot -> 0, or the exit code of the first machine that failed (255: ssh itself)."""
    world, first = sum(host.slots for host in hosts), 0
    machines: list[subprocess.Popen] = []

    def ask_to_stop(number: int, frame: object) -> None:
        for machine in machines:
            if machine.poll() is None and machine.stdin:
                try:
                    machine.stdin.write(STOP)
                    machine.stdin.flush()
                except BrokenPipeError:
                    pass  # it is ending by itself

    previous = {
        number: signal.signal(number, ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    try:
        for host in hosts:
            part = {"command": command, "count": host.slots, "first": first, "world": world}
            part |= {"address": hosts[0].name, "port": port}
            variables = [f"{name}={os.environ[name]}" for name in CARRIED if name in os.environ]
            there = shlex.join(["env", *variables, sys.executable, "-m", "launch.start.hosts", json.dumps(part)])
            line = f"cd {shlex.quote(os.getcwd())} && exec {there}"
            # A session of its own: ctrl-C here must reach the ranks as a request, not end their connection.
            machines.append(
                subprocess.Popen(
                    ["ssh", "-o", "BatchMode=yes", host.name, line], stdin=subprocess.PIPE, start_new_session=True
                )
            )
            first += host.slots
        return wait_for(machines, GRACE)
    finally:
        for machine in machines:
            if machine.stdin:
                machine.stdin.close()  # the far side ends its ranks when it sees this
        for machine in machines:
            try:
                machine.wait(GRACE)
            except subprocess.TimeoutExpired:
                machine.kill()
                machine.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def serve(part: dict) -> int:
    """One machine's ranks, on that machine: asked to stop by a line on standard input, ended when it closes."""

    def listen() -> None:
        while os.read(0, 64):  # not through `sys.stdin`: its lock would be held when this process ends
            os.kill(os.getpid(), signal.SIGUSR1)  # handed to the ranks, which save and leave
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(
            1
        )  # the ranks have asked the kernel for a signal when their parent is gone, and do not outlive it for long

    threading.Thread(target=listen, name="listen", daemon=True).start()
    return run_ranks(**part)


if __name__ == "__main__":
    sys.exit(serve(json.loads(sys.argv[1])))
