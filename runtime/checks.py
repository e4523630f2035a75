"""Checks of what a user gives: numbers in their range, keys that must be set, names, and places that can be written."""

from __future__ import annotations

import argparse
import math
import os
from operator import attrgetter
from pathlib import Path
from typing import Any

from runtime.errors import RecipeError


def check_range(config: Any, prefix: str, low: float, high: float | None, *names: str) -> None:
    """Refuse numbers out of their range. A field that is None has no number to check.

    Args:
        config: the dataclass that holds the numbers.
        prefix: the dotted path to it, such as `optimizer.`.
        low: the least number.
        high: the greatest number. None: any finite one.
        names: the fields.

    Raises:
        RecipeError: a number is out of the range, infinite or not a number.
    """
    bounds = f"{low} or more" if high is None else f"{low} to {high}"
    for name in names:
        value = getattr(config, name)
        if value is not None and not (math.isfinite(value) and low <= value <= (value if high is None else high)):
            raise RecipeError(f"{prefix}{name} is {value}; it must be {bounds}")


def check_given(config: Any, *names: str, instead: str = "") -> None:
    """Refuse a recipe in which keys are empty that must be set, and name all of them.

    Args:
        config: the recipe.
        names: the keys, dotted.
        instead: a key that may stand in place of the first.

    Raises:
        RecipeError: some keys are empty.
    """
    missing = [name for name in names if not attrgetter(name)(config)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        other = f" ({missing[0]} or {instead})" if instead and missing[0] == names[0] else ""
        raise RecipeError(
            f"{_listed(missing)} {verb} not set; give {_listed([f'--{name}' for name in missing])}{other}"
        )


def check_name(key: str, name: str) -> None:
    """Refuse a name that cannot be a folder's name.

    Raises:
        RecipeError: `name`, the value of the recipe key `key`, is empty, has a slash or begins with a dot.
    """
    if not name or "/" in name or name.startswith("."):
        raise RecipeError(
            f"{key} is {name!r}; it names a folder, so it must not be empty, have a slash or begin with a dot"
        )


def check_writable(key: str, path: Path | str, folder: bool) -> None:
    """Refuse a place where nothing can be written. Nothing is created, so that a mistake leaves no trace.

    Args:
        key: the recipe key or the option that names the place.
        path: the file or folder to write. It and the folders above it need not exist.
        folder: whether it is a folder.

    Raises:
        RecipeError: it is of the other kind, or a file stands in its way, or its folder may not be written.
    """
    if why := _refusal(Path(path), folder):
        raise RecipeError(f"{key} is {path}, {why}")


def output_file(text: str) -> Path:
    """Return the path of a file to write, for argparse, or refuse it if it cannot be written."""
    return _output(text, folder=False)


def output_folder(text: str) -> Path:
    """Return the path of a folder to write, for argparse, or refuse it if it cannot be written."""
    return _output(text, folder=True)


def _output(text: str, folder: bool) -> Path:
    if why := _refusal(Path(text), folder):
        raise argparse.ArgumentTypeError(f"{text}, {why}")
    return Path(text)


def _refusal(path: Path, folder: bool) -> str:
    """Return why a file or folder cannot be written. Empty: it can."""
    try:
        if not folder and path.is_dir():
            return "which is a folder; name a file"
        place = path if folder else path.absolute().parent
        while not place.exists():
            place = place.absolute().parent
        if not place.is_dir():
            return f"but {place} is a file; name another {'folder' if folder else 'place'}"
        if not os.access(place, os.W_OK | os.X_OK):
            return f"but {place} may not be written; name another {'folder' if folder else 'place'}"
    except OSError as error:  # such as a name that is too long, or a folder that may not be looked into
        return f"which cannot be written: {error.strerror}"
    return ""


def _listed(words: list[str]) -> str:
    """Return `a, b and c`."""
    return " and ".join([", ".join(words[:-1])] * (len(words) > 1) + words[-1:])
