"""Recipes: a YAML file and dotted overrides become dataclasses, by jsonargparse. Every mistake becomes one line.

A recipe is a dataclass. Its fields are values, or groups of keys, which are dataclasses again. A recipe key is the dotted path
to a value, such as `optimizer.lr`.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from runtime.errors import RecipeError
from runtime.recipe_advice import suggest_key, suggest_recipe
from runtime.recipe_keys import group_of, keys_of

Recipe = TypeVar("Recipe")


class OptionParser(argparse.ArgumentParser):
    """Parses the options of a command without a recipe. A mistake is one line, and options may not be abbreviated."""

    on_help: ClassVar[Callable[[OptionParser], None] | None] = None
    """Called with the parser in place of printing its help. Completion reads the parsers by it."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, allow_abbrev=False, **settings)

    def print_help(self, file: Any = None) -> None:
        """Print the help, or hand the parser to `on_help`."""
        if OptionParser.on_help is None:
            super().print_help(file)
        else:
            OptionParser.on_help(self)

    def error(self, message: str) -> NoReturn:
        """Raise a RecipeError with argparse's message and the command that explains the options."""
        raise RecipeError(f"{self.prog.removeprefix('ligature ')}: {message}; see `{self.prog} --help`")


def read_recipe(kind: type[Recipe], arguments: list[str], command: str) -> Recipe:
    """Parse `--config recipe.yaml --dotted.key value …` into a recipe. `--help` prints every key, or those of a group, and exits.

    Args:
        kind: the recipe's dataclass.
        arguments: the words after the command. Later ones win.
        command: what the help calls the command.

    Raises:
        RecipeError: an argument does not fit; the message has the key, the value and the nearest right key.
    """
    arguments = [part for argument in arguments for part in _split_config_option(argument)]
    for number, argument in enumerate(arguments):
        if argument in ("--help", "-h"):
            from runtime.recipe_help import recipe_help

            print(recipe_help(kind, command, *arguments[number + 1 : number + 2]))
            raise SystemExit(0)
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=command,
        exit_on_error=False,
        allow_abbrev=False,  # `--optimizer.weight 1` is a mistake, not a weight_decay
        add_help=False,  # ours is made without the parser, in a tenth of the time
    )
    parser.add_argument("--config", action="config")
    # The parser only checks types. `build_config` builds the dataclasses, so that errors of __post_init__ stay one line.
    parser.add_class_arguments(kind, as_group=False)
    for number, argument in enumerate(arguments[:-1]):
        if argument == "--config":
            path = find_recipe(arguments[number + 1])
            _check_keys(kind, _read_yaml(path), f"{path}: ")
            arguments[number + 1] = str(path)
    try:
        parsed = parser.parse_args([*arguments])
    except (ArgumentError, TypeError) as error:
        raise RecipeError(_format_parser_error(str(error), keys_of(kind))) from None
    return build_config(kind, parsed.as_dict())


def build_config(kind: type[Recipe], values: dict[str, Any], prefix: str = "") -> Recipe:
    """Build a dataclass from nested dictionaries. The parser's own key `config` is ignored.

    Args:
        kind: the dataclass; fields that are dataclasses are built in the same way.
        values: by field name. Missing fields take their defaults.
        prefix: what errors write before a key.

    Raises:
        RecipeError: a key is unknown, or a value is null that may not be.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, value in values.items():
        # The parser stores --config among the values, though it is no key of the recipe.
        if name == "config" and "config" not in fields:
            continue
        if name not in fields:
            raise RecipeError(
                f"unknown key {prefix}{name}{suggest_key(prefix + name, [prefix + known for known in fields])}"
            )
        if value is None and types.NoneType not in typing.get_args(hints[name]):
            raise RecipeError(f"{prefix}{name} is null; give it a value, or leave the key out for its default")
        if isinstance(value, dict) and (group := group_of(hints[name])):
            value = build_config(group, value, f"{prefix}{name}.")
        elif isinstance(value, dict) and (entry_kind := group_of(typing.get_args(hints[name])[-1])):
            # dict[str, SomeConfig]: the user names the entries.
            value = {key: build_config(entry_kind, entry, f"{prefix}{name}.{key}.") for key, entry in value.items()}
        arguments[name] = value
    return kind(**arguments)


def write_recipe(path: Path, recipe: Any) -> None:
    """Write a resolved recipe as YAML with every key. `--config` and `load_recipe` read it back."""
    import yaml

    from runtime.files import write_text

    write_text(path, yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, allow_unicode=True))


def load_recipe(kind: type[Recipe], path: Path) -> Recipe:
    """Return the recipe that `write_recipe` wrote.

    Raises:
        RecipeError: there is no such file, or it does not fit `kind`.
    """
    if not Path(path).is_file():
        raise RecipeError(f"no recipe at {path}")
    values = _read_yaml(Path(path))
    _check_keys(kind, values, f"{path}: ")
    return build_config(kind, values)


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Return `key: old -> new` for every recipe key in which two recipes of one kind differ."""
    lines = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if dataclasses.is_dataclass(before):
            lines += changed_keys(before, after, f"{prefix}{field.name}.")
        elif before != after:
            lines.append(f"{prefix}{field.name}: {before} -> {after}")
    return lines


def flatten_values(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key. A group of the user's own names, which may be empty, is flattened too."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten_values(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def free(default: Any = dataclasses.MISSING, **settings: Any) -> Any:
    """Return a dataclass field that may change between two starts of one run: a free recipe key.

    A free key says how a run is carried out, not what it computes. Where the field holds a group of keys, all of them are free.

    Args:
        default: the field's default value.
        settings: further arguments of `dataclasses.field`, such as `default_factory`.
    """
    return dataclasses.field(default=default, metadata={"free": True}, **settings)


def free_keys(kind: type, prefix: str = "") -> list[str]:
    """Return the dotted free keys of a recipe; see `free`."""
    hints = typing.get_type_hints(kind)
    keys: list[str] = []
    for field in dataclasses.fields(kind):
        key, group = prefix + field.name, group_of(hints[field.name])
        if field.metadata.get("free"):
            keys += keys_of(group, f"{key}.") if group else [key]
        elif group:
            keys += free_keys(group, f"{key}.")
    return keys


def find_recipe(name: str) -> Path:
    """Return the file of that name, or else the shipped recipe of that name (`pretrain/demo.yaml`)."""
    import configs

    if Path(name).is_file():
        return Path(name)
    shipped = Path(configs.__path__[0]) / name.removeprefix("configs/")
    return shipped if shipped.is_file() else Path(name)


def _split_config_option(argument: str) -> list[str]:
    """Return `--config=FILE` as two words, and every other argument as it is."""
    return ["--config", argument[9:]] if argument.startswith("--config=") else [argument]


def _read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values of a recipe file. Raises RecipeError, in one line, where it holds none."""
    import yaml

    if not path.is_file():
        raise RecipeError(f"--config {path}: no such file{suggest_recipe(path)}")
    try:
        text = path.read_text(encoding="utf-8")
        _check_repeated(yaml.compose(text, Loader=yaml.SafeLoader), f"{path}: ")
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        raise RecipeError(f"{path} is empty; a recipe holds keys and values")
    if not isinstance(values, dict):
        raise RecipeError(f"{path} is not a recipe: it holds a {type(values).__name__}, not keys and values")
    return values


def _check_repeated(node: Any, source: str, prefix: str = "") -> None:
    """Refuse a key that stands twice in one group, of which YAML would silently take the last.

    Args:
        node: a part of the file, as `yaml.compose` returns it. Only mappings have keys.
        source: what errors begin with.
        prefix: the dotted path to `node`.
    """
    if getattr(node, "id", "") == "mapping":
        seen: set[str] = set()
        for name, value in node.value:
            if name.id == "scalar":
                if name.value in seen:
                    line = name.start_mark.line + 1
                    raise RecipeError(
                        f"{source}{prefix}{name.value} stands twice, again in line {line}; keep one of them"
                    )
                seen.add(name.value)
                _check_repeated(value, source, f"{prefix}{name.value}.")


def _check_keys(
    kind: Any, values: dict[str, Any], source: str, prefix: str = "", known: list[str] | None = None
) -> None:
    """Refuse unknown keys of a file by their dotted names; the parser would name only the last part of a key.

    Args:
        kind: the dataclass that the values are for.
        values: the file's content, or a group of it.
        source: what errors begin with, such as `recipe.yaml: `.
        prefix: the dotted path to `values`.
        known: all keys of the whole recipe, to suggest one. None: those of `kind`.
    """
    known = known or keys_of(kind)
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name not in hints:
            raise RecipeError(
                f"{source}unknown key {prefix}{name} (value {value!r}){suggest_key(f'{prefix}{name}', known)}"
            )
        group = group_of(hints[name])
        if group and isinstance(value, dict):
            _check_keys(group, value, source, f"{prefix}{name}.", known)
        elif group and not (value is None and types.NoneType in typing.get_args(hints[name])):
            text = "null" if value is None else repr(value)
            raise RecipeError(f"{source}{prefix}{name} is {text}; it is a group of keys: {', '.join(keys_of(group))}")


def _format_parser_error(message: str, keys: list[str]) -> str:
    """Return jsonargparse's error as one line in our words, with the nearest key where a key is unknown.

    Its errors carry no structure, so each pattern below reads one form of its text. An unknown form is returned as it is.
    """
    line = re.sub(r"\s+", " ", message).strip()
    if unknown := re.search(r"[Uu]nrecognized arguments?: --([\w.-]+)(?:[= ](\S+))?", line):
        value = f" (value {unknown[2]!r})" if unknown[2] else ""
        return f"unknown key {unknown[1]}{value}{suggest_key(unknown[1], keys)}"
    if unknown := re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", line):
        return f"unknown key {unknown[1]}.{unknown[2]}{suggest_key(f'{unknown[1]}.{unknown[2]}', keys)}"
    if stray := re.search(r"[Uu]nrecognized arguments?: (.+)", line):
        return f"{stray[1]!r} belongs to no key; write --key VALUE, or --config FILE for a recipe"
    if bare := re.search(r"argument --([\w.]+): expected one argument", line):
        return f"{bare[1]} has no value; write --{bare[1]} VALUE"
    if group := re.match(r'Parser key "([\w.]+)": Unable to load config \'(.*?)\' -', line):
        members = [key for key in keys if key.startswith(f"{group[1]}.")]
        return f"{group[1]} is {group[2]!r}; it is a group of keys: {', '.join(members)}"
    if union := re.match(
        r'Parser key "([\w.]+)": Does not validate.*Subtypes: \[(.*?)\] Errors:.*Given value: (.*)', line
    ):
        names = [re.sub(r"<class '(.*?)'>", r"\1", part).replace("NoneType", "null") for part in union[2].split(", ")]
        return f"{union[1]} is {union[3]!r}; it must be {' or '.join(names)}"
    if wrong := re.match(r'Parser key "([\w.]+)": Expected an? (.+?)\. Got value: (.*)', line):
        kind = re.sub(r"<class '(.*?)'>", r"\1", wrong[2]).replace("typing.Literal", "one of ")
        choices = re.findall(r"'(\w+)'", kind)
        close = difflib.get_close_matches(wrong[3], choices, n=1, cutoff=0.5)
        return f"{wrong[1]} is {wrong[3]!r}; it must be {kind}" + (f": did you mean {close[0]}?" if close else "")
    return line
