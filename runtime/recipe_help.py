"""The text of `--help` for a command with a recipe: every key with its type, default and meaning, group by group.

It is made from the dataclass alone, without the parser, so that help comes at once.
"""

from __future__ import annotations

import shutil
import textwrap
from dataclasses import MISSING

from runtime.errors import RecipeError
from runtime.recipe_advice import suggest_key
from runtime.recipe_keys import Group, Key, format_default, groups_of

CONFIG = (
    "A recipe file (YAML): your own, or a shipped one such as `pretrain/demo.yaml`. It may be given more than once; later files and "
    "options win."
)
MARK = "Keys marked * may change between two starts of a run."


def recipe_help(kind: type, command: str, part: str = "") -> str:
    """Return the help of a command with a recipe.

    Args:
        kind: the recipe's dataclass.
        command: what the help calls the command, such as `ligature pretrain`.
        part: a group (`optimizer`) or a key (`optimizer.lr`) that help is asked for. Empty, or an option: all keys.

    Raises:
        RecipeError: the recipe has no such group or key.
    """
    groups = groups_of(kind)
    if part and not part.startswith("-"):
        return "\n".join(format_groups(select(groups, part)))
    lines = [f"usage: {command} [--config RECIPE] [--KEY VALUE …]", "", *wrap(groups[0].about, 0), ""]
    lines += ["  --config RECIPE", *wrap(CONFIG, 6)]
    lines += ["  --print_config", *wrap("Print the recipe with all its keys, as YAML, and stop.", 6)]
    names = ", ".join(group.name for group in groups if group.name.isidentifier())
    lines += ["  --help [GROUP]", *wrap(f"Print this text, or one key, or one group{names and f' ({names})'}.", 6)]
    if any(key.free for group in groups for key in group.keys):
        lines += ["", MARK]
    own = Group("", "The recipe's own keys", groups[0].keys)
    return "\n".join([*lines, "", *format_groups([own, *groups[1:]])])


def select(groups: list[Group], part: str) -> list[Group]:
    """Return the group of that name with the groups in it, or a group that holds the key of that name alone.

    Raises:
        RecipeError: there is neither; the message names the nearest key.
    """
    if chosen := [group for group in groups if f"{group.name}.".startswith(f"{part}.")]:
        return chosen
    for group in groups:
        if keys := [key for key in group.keys if key.name == part]:
            return [Group(group.name, group.about, keys)]
    names = [key.name for group in groups for key in group.keys]
    raise RecipeError(f"no key or group {part}{suggest_key(part, names)}")


def format_groups(groups: list[Group], dashes: bool = False) -> list[str]:
    """Return the lines of some groups: a heading, and below it the keys.

    Args:
        groups: the groups in the order of the text. Those without keys of their own are headings.
        dashes: write options as `--gpus-per-node`, as the launcher does.
    """
    lines: list[str] = []
    for group in groups:
        heading = f"{group.name}: {group.about}" if group.name else f"{group.about}:"
        lines += [*([""] if lines else []), *wrap(heading, 0)]
        for key in group.keys:
            lines += format_key(key, dashes)
    return lines


def format_key(key: Key, dashes: bool = False) -> list[str]:
    """Return the lines of one key: option, form and default, then what it means."""
    option = key.name.replace("_", "-") if dashes else key.name
    default = "required" if key.default is MISSING else f"default {format_default(key.default)}"
    return [f"  --{option} {key.form}{' *' * key.free}  ({default})", *wrap(key.about, 6)]


def wrap(text: str, indent: int) -> list[str]:
    """Return a text as indented lines that fit the terminal, at most 100 columns."""
    width = min(100, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)
