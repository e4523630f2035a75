"""`ligature ablate`: arms that differ in a few keys, run with the same seeds, compared in pairs."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.ablation.config import AblateRecipe, Comparison
from launch.ablation.table import Found, draw, table
from launch.ablation.workers import side_by_side
from launch.stages import read_stage
from launch.start.command import print_heading
from runtime.checkpoint import resolve_pointer
from runtime.errors import RecipeError
from runtime.files import read_json, write_json, write_text
from runtime.progress import format_duration
from runtime.recipe import load_recipe, write_recipe


def run_arms(recipe: AblateRecipe, start: Callable[..., None]) -> str:
    """Run the arms that have not run yet, seed by seed, and write `results.json`, `table.md` and `differences.png`.

    An interrupted run resumes, and the same command again runs only what is missing. What `results.json` holds is not
    run again, so that file, with the `config.yaml` beside it, moves a comparison to another machine.

    Args:
        recipe: The arms, seeds and comparisons.
        start: Runs a `ligature` command, its arguments given one by one; see `launch.ablation.workers.Workers`.

    Returns:
        The table.
    """
    folder = Path(recipe.runs) / recipe.name
    for shared in recipe.conditions.values():  # a mistake in any arm is answered before the first one runs
        for changes in recipe.arms.values():
            read_stage("pretrain", ["--config", recipe.base, *options(shared | changes)])
    check_records(folder, recipe)
    write_recipe(folder / "config.yaml", recipe)  # with its predictions, before anything runs

    def run_one(place: tuple[int, str, str]) -> dict[str, float]:
        seed, condition, arm = place
        name = "-".join(part for part in (condition, arm, f"seed{seed}") if part)
        record = folder / f"{name}.json"
        if not record.is_file():
            launcher = ("launch", "local", "--nproc", str(recipe.processes)) if recipe.processes > 1 else ()
            keys = {"name": name, "runs": str(folder), "training.seed": seed}
            keys |= recipe.conditions[condition] | recipe.arms[arm]
            start(*launcher, "pretrain", "--config", recipe.base, *options(keys))
            scored = {"checkpoint": _last_checkpoint(folder / name), "data": recipe.data, "device": "auto"}
            start("evaluate", *options(scored | {"dataset": recipe.name, "split": "test", "out": record}))
        return measures(record, folder / name, recipe)

    results = folder / "results.json"
    found = read_results(results, recipe)
    missing = [
        (seed, condition, arm)
        for seed in recipe.seeds
        for condition in recipe.conditions
        for arm in recipe.arms
        if seed not in found[condition][arm]
    ]
    began = time.monotonic()
    for made, (place, measured) in enumerate(
        zip(missing, side_by_side(run_one, missing, recipe.jobs), strict=True), start=1
    ):
        seed, condition, arm = place
        found[condition][arm][seed] = measured
        write_json(results, found)
        left = (time.monotonic() - began) / made * (len(missing) - made)
        print_heading(f"{made} of {len(missing)} runs, {format_duration(left)} left")
    found = read_results(results, recipe)
    text = table(found, recipe)
    write_text(folder / "table.md", text + "\n")
    draw(found, recipe, folder / "differences.png")
    print_heading("the table")
    return text


def read_results(results: Path, recipe: AblateRecipe) -> Found:
    """What has been measured, its seeds in the recipe's order, whatever the order in which they were run."""
    stored = read_json(results) if results.is_file() else {}
    found: Found = {}
    for condition in recipe.conditions:
        found[condition] = {}
        for arm in recipe.arms:
            measured = stored.get(condition, {}).get(arm, {})
            found[condition][arm] = {seed: measured[str(seed)] for seed in recipe.seeds if str(seed) in measured}
    return found


def check_records(folder: Path, recipe: AblateRecipe) -> None:
    """Refuse a folder whose records were made, or predicted, otherwise: arms, comparisons, conditions and seeds may only be added."""
    if not (folder / "config.yaml").is_file():
        if (folder / "results.json").is_file():
            raise RecipeError(
                f"{folder} holds results.json without the config.yaml that it was made by; put it there too"
            )
        return
    before = load_recipe(AblateRecipe, folder / "config.yaml")
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(recipe, field.name)
        if field.name == "comparisons":
            old, new = _stated(old), _stated(new)
        if isinstance(old, dict):
            kept = all(name in new and new[name] == value for name, value in old.items())
        else:
            kept = set(old) <= set(new) if isinstance(old, list) else old == new
        if not kept and field.name not in ("runs", "jobs"):
            raise RecipeError(
                f"{folder} holds records of another recipe ({field.name}: {old} -> {new}); choose another --name, or remove it"
            )


def _stated(comparisons: dict[str, Comparison]) -> dict[tuple[str, str], str]:
    """Comparison and arm -> its prediction; comparison and `` -> its baseline."""
    return {
        (name, arm): told for name, one in comparisons.items() for arm, told in {"": one.baseline, **one.arms}.items()
    }


def options(keys: dict[str, Any]) -> list[str]:
    """Keys and values as a command line's options."""
    return [
        part for key, value in keys.items() for part in (f"--{key}", value if isinstance(value, str) else _spell(value))
    ]


def _spell(value: Any) -> str:
    return str(value) if isinstance(value, Path) else json.dumps(value)


def _last_checkpoint(run_folder: Path) -> Path:
    """Not the best, which validation chooses, and which differs in age between arms."""
    checkpoints = run_folder / "checkpoints"
    return resolve_pointer(checkpoints, "latest") or checkpoints


def measures(record: Path, run_folder: Path, recipe: AblateRecipe) -> dict[str, float]:
    scores = read_json(record)
    ways = ("image_to_text", "text_to_image")
    found = {"MRR": sum(scores[way]["mean_reciprocal_rank"] for way in ways) / 2}
    if recipe.scenes:
        stored = record.with_suffix(".information.json")
        if not stored.is_file():
            from launch.ablation.codeword_information import information_of_run

            write_json(stored, information_of_run(_last_checkpoint(run_folder), recipe.data, recipe.scenes))
        bits = read_json(stored)
        if bits:
            found["MI"] = sum(bits.values())
            found |= {f"MI {name}": value for name, value in bits.items()}
    return found
