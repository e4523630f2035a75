"""A run's recipe on a page, with what differs from the recipe that the run was started from, or between runs.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune.config import FinetuneRecipe
from pretrain.config import PretrainRecipe
from runtime.files import read_json
from runtime.page import escape
from runtime.recipe import find_recipe, flatten_values, load_recipe

STYLE = """
.recipe td, .recipe th { overflow-wrap: anywhere; padding: 3px 14px; font-size: 13px } .recipe mark { background: var(--note); color: inherit; padding: 1px 4px; border-radius: 3px }
details { margin-top: 12px } summary { cursor: pointer; color: var(--soft) } details table { margin-top: 8px }
"""

Recipe = PretrainRecipe | FinetuneRecipe


@dataclass
class Base:
    """The recipe that a run was started from."""

    name: str
    """What the page calls it."""
    values: dict[str, Any]
    """Its values by dotted key."""


def read_recipe_of(run: Path) -> Recipe:
    """Return a run's recipe: of pretraining, or of fine-tuning, which alone has a head.

    Raises:
        RecipeError: config.yaml is damaged.
    """
    # Its text is enough to tell the kind: a damaged recipe is then named as what it is.
    text = (run / "config.yaml").read_text(encoding="utf-8")
    kind: type[Recipe] = FinetuneRecipe if re.search(r"^head:", text, re.MULTILINE) else PretrainRecipe
    return load_recipe(kind, run / "config.yaml")


def find_base(run: Path, kind: type[Recipe]) -> Base:
    """Return the recipe that the run's last start named with --config, or the defaults where that file cannot be read here."""
    values = flatten_values(default_values(kind))
    command = read_json(run / "environment.json")["command"] if (run / "environment.json").is_file() else []
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words[:-1]:
        return Base("the defaults", values)
    name = words[words.index("--config") + 1]
    try:
        return Base(name, values | flatten_values(yaml.safe_load(find_recipe(name).read_text(encoding="utf-8")) or {}))
    except (
        OSError,
        UnicodeDecodeError,
        yaml.YAMLError,
        AttributeError,
    ):  # a file of the user's that is elsewhere by now
        return Base(f"the defaults ({name} cannot be read from here)", values)


def default_values(kind: type) -> dict[str, Any]:
    """Return the defaults of a recipe's keys, nested. They need not make a recipe: some keys must be given."""
    defaults = {}
    for field in dataclasses.fields(kind):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        defaults[field.name] = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
    return defaults


def recipe_html(run: Path, recipe: Recipe) -> list[str]:
    """Return what a run's recipe changes, and below it, folded, the whole recipe with those keys highlighted."""
    base, values = find_base(run, type(recipe)), flatten_values(dataclasses.asdict(recipe))
    changed = [key for key in values if values[key] != base.values.get(key)]
    parts = [
        f"<h2>Recipe</h2><p class=soft>Compared with {escape(base.name)}: {len(changed)} of {len(values)} keys differ.</p>"
    ]
    if changed:
        rows = [
            [f"<td>{_format(base.values.get(key))}</td>", f"<td><mark>{_format(values[key])}</mark></td>"]
            for key in changed
        ]
        parts.append(_table(["key", "there", "this run"], changed, rows))
    whole = [
        [f"<td><mark>{_format(value)}</mark></td>" if key in changed else f"<td>{_format(value)}</td>"]
        for key, value in values.items()
    ]
    parts.append(f"<details><summary>All keys</summary>{_table(['key', 'value'], list(values), whole)}</details>")
    return parts


def compared_recipes_html(recipes: dict[str, Recipe]) -> list[str]:
    """Return the keys in which recipes differ, with a column for each run; a value unlike the first run's is highlighted.

    Recipes of pretraining and of fine-tuning are compared in the keys that both have.
    """
    flat = {run: flatten_values(dataclasses.asdict(recipe)) for run, recipe in recipes.items()}
    first, *others = flat.values()
    keys = [key for key in first if all(key in values for values in others)]
    differing = [key for key in keys if any(values[key] != first[key] for values in others)]
    rows = []
    for key in differing:
        cells = [f"<td>{_format(first[key])}</td>"]
        for values in others:
            text = _format(values[key])
            cells.append(f"<td>{text if values[key] == first[key] else f'<mark>{text}</mark>'}</td>")
        rows.append(cells)
    kinds = len({type(recipe) for recipe in recipes.values()})
    common = "Of the keys that both kinds of recipe have, " if kinds > 1 else ""
    parts = [f"<h2>Recipes</h2><p class=soft>{common}{len(differing)} of {len(keys)} keys differ.</p>"]
    return [*parts, _table(["key", *recipes], differing, rows)] if differing else parts


def _table(head: list[str], keys: list[str], rows: list[list[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(f"<tr><th>{escape(key)}</th>{''.join(cells)}</tr>" for key, cells in zip(keys, rows, strict=True))
    return f"<table class=recipe><tr>{titles}</tr>{body}</table>"


def _format(value: Any) -> str:
    """Return a value as YAML would show it, short and escaped."""
    return escape(value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False))
