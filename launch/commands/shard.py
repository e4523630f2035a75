"""`ligature shard`: write WebDataset shards from captioned images.

Tested in tests/launch/commands/test_shard_command.py.
"""

from __future__ import annotations

from launch.stages import read_shard_options


def run(arguments: list[str]) -> None:
    """Read the options, then write the shards and print a summary."""
    options = read_shard_options(arguments)
    from data_tools.making.writer import shard

    shard(options)
