"""The keys of a recipe, read from its dataclass: names, types, defaults and the texts below the fields.

Tested in tests/runtime/test_recipe_help.py.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import types
import typing
from pathlib import Path
from typing import Any

WORDS = {
    int: "INT",
    float: "NUMBER",
    str: "TEXT",
    bool: "true|false",
    Path: "PATH",
    types.NoneType: "null",
    Any: "VALUE",
}
"""What help calls the type of a value."""


@dataclasses.dataclass(frozen=True)
class Key:
    """A recipe key, as help and completion need it."""

    name: str
    """The dotted path, such as `optimizer.lr`."""
    about: str
    """The docstring below its field, in one line."""
    form: str
    """What a value looks like: `INT`, `fp32|bf16`, `[NUMBER, …]`."""
    default: Any
    """`dataclasses.MISSING` where the key must be given."""
    choices: tuple[str, ...]
    """The values it may have, if they can be listed."""
    free: bool
    """Whether it may change between two starts of a run."""


@dataclasses.dataclass(frozen=True)
class Group:
    """Keys that stand together in a recipe."""

    name: str
    """The dotted path of the group. Empty: the recipe's own keys."""
    about: str
    keys: list[Key]


def group_of(hint: Any) -> Any:
    """Return the dataclass in a type hint (`SomeConfig` or `SomeConfig | None`), or None where the field is a value."""
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((member for member in members if dataclasses.is_dataclass(member)), None)


def keys_of(kind: type, prefix: str = "") -> list[str]:
    """Return all dotted keys of a recipe, in the order of its fields."""
    keys = []
    for name, hint in typing.get_type_hints(kind).items():
        group = group_of(hint)
        keys += keys_of(group, f"{prefix}{name}.") if group else [prefix + name]
    return keys


def groups_of(kind: type, name: str = "", about: str = "", default: Any = None, free: bool = False) -> list[Group]:
    """Return the groups of a recipe with all their keys: first its own, then the groups in it, in the order of its fields.

    Where the user names the entries of a group (`dict[str, SomeConfig]`), the group of an entry is called `….NAME`.

    Args:
        kind: the dataclass of the recipe, or of a group of it.
        name: the dotted path of that group.
        about: what the group is for. Empty: the summary of the dataclass's docstring.
        default: a value of `kind`, whose fields are the defaults. None: the defaults of the fields.
        free: whether all keys of the group are free.
    """
    hints, texts = typing.get_type_hints(kind), field_texts(kind)
    prefix = f"{name}." if name else ""
    own = Group(name, about or " ".join((kind.__doc__ or "").strip().split("\n\n")[0].split()), [])
    inner: list[Group] = []
    for field in dataclasses.fields(kind):
        hint, text = hints[field.name], texts[field.name]
        value = _default_of(field) if default is None else getattr(default, field.name)
        is_free = free or bool(field.metadata.get("free"))
        if group := group_of(hint):
            inner += groups_of(group, prefix + field.name, text, value, is_free)
            continue
        own.keys.append(Key(prefix + field.name, text, form_of(hint), value, _choices_of(hint), is_free))
        if entry := group_of((typing.get_args(hint) or (None,))[-1]):
            inner += groups_of(entry, f"{prefix}{field.name}.NAME", "", None, is_free)
    return [own, *inner]


def field_texts(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, in one line; empty where there is none. Inherited fields count."""
    texts: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        body = _bodies_in(inspect.getfile(owner)).get(owner.__name__, []) if owner is not object else []
        for node, after in itertools.pairwise([*body, None]):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                texts[node.target.id] = " ".join(str(after.value.value).split()) if documented else ""  # type: ignore[union-attr]
    return texts


@functools.cache
def _bodies_in(path: str) -> dict[str, list[ast.stmt]]:
    """Return the statements of each class in a source file. Python keeps no docstrings of fields, so the source is read."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return {node.name: node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def form_of(hint: Any) -> str:
    """Return what a value of a type looks like in a recipe or on the command line."""
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return "|".join(map(str, arguments))
    if origin is list:
        return f"[{form_of(arguments[0])}, …]"
    if origin is dict:
        return f"{{NAME: {form_of(arguments[1])}, …}}"
    if arguments:  # a union
        return " or ".join(form_of(member) for member in arguments)
    return "GROUP" if dataclasses.is_dataclass(hint) else WORDS[hint]


def format_default(value: Any) -> str:
    """Return a default as a recipe writes it, in words where it is an empty text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name or repr(name)}: {format_default(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(format_default, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else "empty"


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _choices_of(hint: Any) -> tuple[str, ...]:
    """Return the values of a Literal, of a bool, or of a union or list that holds one."""
    if typing.get_origin(hint) is typing.Literal:
        return tuple(map(str, typing.get_args(hint)))
    if hint is bool:
        return ("true", "false")
    return tuple(choice for member in typing.get_args(hint) for choice in _choices_of(member))
