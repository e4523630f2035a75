"""Prints docs/reference_keys.md: every key of every recipe, from the same dataclasses as `--help`. `make keys` writes the page.

Tested in tests/launch/test_reference.py.
"""

from __future__ import annotations

import importlib
from dataclasses import MISSING
from pathlib import Path

import configs
from launch.stages import RECIPES
from runtime.recipe_keys import Group, Key, format_default, groups_of

KINDS = RECIPES | {
    "shard": ("data_tools.making.writer", "ShardOptions"),
    "launch slurm": ("launch.start.config", "LaunchOptions"),
}
"""Command -> the module and the name of the dataclass with its keys."""
SHIPPED = {
    "pretrain": "pretrain/*.yaml",
    "finetune": "finetune/**/*.yaml",
    "evaluate": "finetune/**/*evaluate.yaml",
    "ablate": "ablate/*.yaml",
    "launch slurm": "launch/*.yaml",
}
"""Command -> pattern of the shipped recipes that show its keys, under configs/."""
TITLE = """\
# Every key of every recipe

A key is set in a recipe file (`--config FILE`, YAML), or on the command line as `--KEY VALUE`, which wins. `ligature COMMAND --help`
prints the same text, `ligature pretrain --help optimizer` one group of it, and `ligature COMMAND … --print_config` the values that a
run would take. An unknown key is refused, with the nearest right one.

Keys marked * may change between two starts of a run. NAME is a name of your own.

<!-- `make keys` writes this page from the docstrings below the fields; change those. -->
"""


def reference_page() -> str:
    """Return the page in Markdown."""
    lines = [TITLE]
    for command in KINDS:
        own, *inner = command_groups(command)
        lines += [f"## ligature {command}", "", own.about, ""]
        if recipes := shipped_recipes(command):
            lines += [f"Shipped: {', '.join(f'`{name}`' for name in recipes)}.", ""]
        lines += _table(own.keys)
        for group in inner:
            lines += [f"### {command}: {group.name}", "", group.about, "", *_table(group.keys)]
    return "\n".join(lines).rstrip() + "\n"


def command_groups(command: str) -> list[Group]:
    """Return the groups of a command's keys."""
    module, name = KINDS[command]
    return groups_of(getattr(importlib.import_module(module), name))


def shipped_recipes(command: str) -> list[str]:
    """Return the names of a command's shipped recipes, as `--config` takes them."""
    folder = Path(configs.__path__[0])
    names = [str(path.relative_to(folder)) for path in sorted(folder.glob(SHIPPED.get(command, "none")))]
    return [name for name in names if command != "finetune" or "evaluate" not in name]


def _table(keys: list[Key]) -> list[str]:
    """Return a Markdown table of some keys, and an empty line. Nothing if there are no keys."""
    rows = []
    for key in keys:
        mark = r" \*" if key.free else ""
        default = "required" if key.default is MISSING else _code(format_default(key.default))
        rows.append(f"| `{key.name}`{mark} | {_code(key.form)} | {default} | {_escape(key.about)} |")
    return ["| key | value | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []


def _code(text: str) -> str:
    return text if text == "empty" else f"`{_escape(text)}`"


def _escape(text: str) -> str:
    """Return a text for a cell of a table, where a bar would end the cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference_page(), end="")
