"""`ligature launch`: run a stage as several processes on this machine, on several machines, or on a SLURM cluster.

Tested in tests/launch/start/test_launch_slurm.py.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from dataclasses import replace
from pathlib import Path

from launch.start.config import LaunchOptions
from launch.start.hosts import launch_hosts
from launch.start.job import STAGES as SLURM_STAGES
from launch.start.local import STAGES, launch_local
from launch.start.slurm import launch_slurm
from runtime.errors import RecipeError
from runtime.recipe import OptionParser, read_recipe
from runtime.recipe_help import format_groups, wrap
from runtime.recipe_keys import groups_of, keys_of

FLAGS = ("dry_run", "resume_with_changes")
"""Options of `ligature launch slurm` that take no value."""
SITE = "The cluster's settings: a YAML file with any of the keys below. Examples: `launch/modules.yaml`, `launch/container.yaml`."


def run(arguments: list[str]) -> None:
    """Start a stage where the first argument says: `local`, `hosts` or `slurm`."""
    if arguments[:1] == ["slurm"]:
        run_slurm(arguments[1:])
    elif arguments[:1] == ["hosts"]:
        run_hosts(arguments[1:])
    else:
        run_local(arguments)


def run_local(arguments: list[str]) -> None:
    """Run a stage on this machine. The arguments still include the word `local`."""
    parser = OptionParser(
        "ligature launch",
        description="Run a stage as several processes on this machine.",
        epilog="On several machines: `ligature launch hosts --help`. On a cluster: `ligature launch slurm --help`.",
    )
    parser.add_argument("where", choices=["local", "hosts", "slurm"], help="here: local")
    parser.add_argument("--nproc", type=int, default=2, help="number of processes (default 2)")
    parser.add_argument("stage", choices=STAGES, help="the stage to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the stage's own arguments")
    options = parser.parse_args(arguments)
    if options.where != "local":
        raise RecipeError(f"name {options.where} first: ligature launch {options.where} …")
    if options.nproc < 1:
        raise RecipeError(f"--nproc is {options.nproc}; it is a number of processes, 1 or more")
    launch_local(options.stage, options.arguments, options.nproc)


def run_hosts(arguments: list[str]) -> None:
    """Run a stage on the machines of a hostfile."""
    parser = OptionParser("ligature launch hosts", description="Run a stage on several machines, over ssh.")
    parser.add_argument("--hostfile", type=Path, required=True, help="file with one machine a line: `node1 slots=8`")
    parser.add_argument(
        "--port", type=int, help="port of the first machine where the ranks meet (default: one from 20000 to 32000)"
    )
    parser.add_argument("stage", choices=STAGES, help="the stage to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="the stage's own arguments")
    options = parser.parse_args(arguments)
    launch_hosts(options.stage, options.arguments, options.hostfile, options.port)


def run_slurm(arguments: list[str]) -> None:
    """Submit a stage to SLURM."""
    options, rest = read_slurm_options(arguments)
    stage, rest = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else ("pretrain", rest)
    if stage not in SLURM_STAGES:
        close = difflib.get_close_matches(stage, SLURM_STAGES, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the stages are {', '.join(SLURM_STAGES)}"
        raise RecipeError(f"no stage `{stage}`; {hint}")
    launch_slurm(stage, rest, options)


def read_slurm_options(arguments: list[str]) -> tuple[LaunchOptions, list[str]]:
    """Separate the launcher's options (`--gpus-per-node 8`, anywhere on the line) from the stage and its arguments.

    Returns:
        The launcher's options, and the remaining arguments: the stage, if named, and its own.

    Raises:
        RecipeError: An option has no value, or a wrong one.
    """
    launcher: list[str] = []
    rest: list[str] = []
    # Sorted by hand: the launcher's options may stand anywhere among the stage's, which only the stage's recipe knows.
    known = {*keys_of(LaunchOptions), "container", "site"}
    remaining = iter(arguments)
    for argument in remaining:
        name, equals, value = argument.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        # After a stage, `--help` asks for the stage's own help.
        if name in ("--help", "-h") and not rest:
            print(slurm_usage())
            sys.exit(0)
        if not name.startswith("--") or key not in known:
            rest.append(argument)
        elif key in FLAGS:
            launcher.append(f"--{key}={value or 'true'}")
        elif not equals and (not (value := next(remaining, "")) or value.startswith("--")):
            raise RecipeError(f"{name} has no value; write {name} VALUE")
        elif key == "site":
            # Read first, so that the command line wins over the site's file wherever the option stands.
            launcher = ["--config", value, *launcher]
        else:
            launcher.append(f"--{key}={value}")
    return read_recipe(LaunchOptions, launcher, "ligature launch slurm"), rest


def slurm_usage() -> str:
    """Return the text of `ligature launch slurm --help`."""
    lines = ["usage: ligature launch slurm [STAGE] [the stage's own options] [these, anywhere]", ""]
    lines += [f"Submit a stage to SLURM ({', '.join(SLURM_STAGES)}; default pretrain).", ""]
    lines += ["  --site FILE", *wrap(SITE, 6), ""]
    own, *inner = groups_of(LaunchOptions)
    lines += format_groups([replace(own, about="The job and this launch"), *inner], dashes=True)
    return "\n".join(lines)
