"""The commands of docs/data.md are accepted by the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launch.stages import read_shard_options

PAGE = Path(__file__).parents[3] / "docs/data.md"
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("ligature shard ")
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[2])
def test_the_commands_of_the_data_page_are_accepted(command):
    options = read_shard_options(command[2:])
    assert str(options.out).startswith("shards/") and str(options.annotation) == command[2]
    assert len(options.exclude) == command.count("--exclude")


def test_the_page_has_a_command_for_every_dataset():
    text = " ".join(" ".join(command) for command in COMMANDS)
    for name in ("coco", "flickr30k", "Flickr8k", "cc3m", "cc12m", "vg.json", "multi30k", "photos"):
        assert name in text


def test_exclude_may_be_given_in_either_spelling():
    options = read_shard_options(["a.json", "--out", "o", "--exclude", "one", "--exclude=two"])
    assert options.exclude == [Path("one"), Path("two")]
