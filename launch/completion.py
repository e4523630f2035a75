"""`ligature completion bash|zsh|fish`: a completion script for a shell, made by shtab from the commands' own parsers and keys.

The script holds every word it offers, so completing starts no Python.

Tested in tests/launch/test_completion.py.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shtab

from launch.reference import KINDS, command_groups, shipped_recipes
from launch.start.job import STAGES as SLURM_STAGES
from launch.start.local import STAGES
from launch.table import COMMANDS, find_command
from runtime.checks import output_file, output_folder
from runtime.recipe import OptionParser

if TYPE_CHECKING:
    from argparse import Action, ArgumentParser

KEYS_OF = {name: name for name in KINDS if name in COMMANDS} | {"plan": "pretrain"}
"""Command -> the command whose recipe keys are its options."""
PLACES = {
    "local": ("several processes on this machine", STAGES),
    "hosts": ("several machines, over ssh", STAGES),
    "slurm": ("a SLURM cluster", SLURM_STAGES),
}
"""What follows `ligature launch`: where a stage runs, and the stages that may follow."""
ON_DISK = re.compile(r"\b(file|folder|tar|checkpoint)s?\b", re.IGNORECASE)
"""Words in a key's text that show its value to be a path."""


def completion(shell: str) -> str:
    """Return the completion script of a shell: bash, zsh or fish."""
    return shtab.complete(command_tree(), shell=shell) + "\n"


def command_tree() -> ArgumentParser:
    """Return a parser of all commands with their options. It describes the command line, but reads none."""
    root = argparse.ArgumentParser("ligature", description="Pretrain image-text models and turn them into search.")
    root.add_argument("--version", action="store_true", help="print the version")
    commands = root.add_subparsers()
    for name, command in COMMANDS.items():
        if name == "launch":
            add_places(commands.add_parser(name, help=_plain(command.about)))
        else:
            add_command(commands, name)
    return root


def add_places(launch: ArgumentParser) -> None:
    """Add `local`, `hosts` and `slurm`, each with its own options and the stages that it starts."""
    places = launch.add_subparsers()
    for place, (about, stages) in PLACES.items():
        parser = places.add_parser(place, help=about, description=about)
        if place == "slurm":
            add_keys(parser, "launch slurm", dashes=True)
            parser.add_argument("--site", help="the cluster's settings").complete = _recipe_files("launch slurm")  # type: ignore[attr-defined]
        else:
            options = parser_of(["launch", place])
            for action in options._actions:
                if action.option_strings and action.dest != "help":
                    parser._add_action(_with_files(action))
        inner = parser.add_subparsers()
        for stage in stages:
            add_command(inner, stage)


def add_command(commands: Any, name: str) -> None:
    """Add a command with its options to a parser's subparsers."""
    own = [] if name in KINDS else [parser_of([name])]
    about = _plain(COMMANDS[name].about)
    parser = commands.add_parser(name, help=about, description=about, parents=own, add_help=not own)
    for action in parser._actions:
        _with_files(action)
    if name == "shard":
        parser.add_argument("source", help="caption file, folder or tars").complete = shtab.FILE
    if name in KEYS_OF:
        add_keys(parser, KEYS_OF[name])


def add_keys(parser: ArgumentParser, command: str, dashes: bool = False) -> None:
    """Add the recipe keys of a command as options, with the values they may have.

    Args:
        parser: what they are added to.
        command: a key of `launch.reference.KINDS`.
        dashes: write options as `--gpus-per-node`, as the launcher does.
    """
    if not dashes:
        parser.add_argument("--config", help="a recipe").complete = _recipe_files(command)  # type: ignore[attr-defined]
        parser.add_argument("--print_config", action="store_true", help="print the recipe with all its keys")
    for group in command_groups(command):
        for key in group.keys:
            if "NAME" in key.name:
                continue
            option = key.name.replace("_", "-") if dashes else key.name
            action = parser.add_argument(f"--{option}", choices=key.choices or None, help=_plain(key.about))
            if not key.choices and ON_DISK.search(key.about) and re.search("TEXT|PATH", key.form):
                action.complete = shtab.FILE  # type: ignore[attr-defined]


def parser_of(command: list[str]) -> OptionParser:
    """Return the parser that a command without a recipe reads its options with."""
    parsers: list[OptionParser] = []
    OptionParser.on_help = parsers.append
    try:
        with contextlib.suppress(SystemExit):
            find_command(command[0]).load()([*command[1:], "--help"])
    finally:
        OptionParser.on_help = None
    return parsers[0]


def _with_files(action: Action) -> Action:
    """Let an argument that is a path be completed by files, or by folders."""
    if action.type in (Path, output_file):
        action.complete = shtab.FILE  # type: ignore[attr-defined]
    elif action.type is output_folder:
        action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    return action


def _recipe_files(command: str) -> dict[str, Any]:
    """Return how each shell completes a recipe of a command: by the shipped ones and by files."""
    names = shlex.join(shipped_recipes(command))
    # shtab lets bash complete paths step by step where the function's name has `_file`.
    function = f"_ligature_recipe_files_{command.replace(' ', '_')}"
    bash = f'{function}() {{\n  compgen -W "{names}" -- "$1"\n  compgen -f -- "$1"\n}}'
    # In a function, because a colon inside an argument's specification would end it.
    zsh = f"{function}() {{\n  _alternative 'recipes:shipped recipe:({names})' 'files:file:_files'\n}}"
    return {
        "bash": function,
        "zsh": function,
        "fish": f"(printf '%s\\n' {names}; __fish_complete_path (commandline -ct))",
        "preamble": {"bash": bash, "zsh": zsh},
    }


def _plain(text: str) -> str:
    """Return a text as argparse takes help: a percent sign is written twice."""
    return text.replace("%", "%%")
