"""Run an ablation: arms that differ in a few recipe keys, with the same seeds, compared in pairs.

Tested in tests/launch/ablation/test_ablation.py.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.ablation.config import AblateRecipe, Comparison
from launch.ablation.table import Results, draw, format_table
from launch.ablation.workers import side_by_side
from launch.stages import read_stage
from launch.start.command import print_heading
from runtime.checkpoint import resolve_pointer
from runtime.errors import RecipeError
from runtime.files import read_json, write_json, write_text
from runtime.progress import format_duration
from runtime.recipe import load_recipe, write_recipe

Start = Callable[..., None]
"""Runs one `ligature` command. Takes the command's words as separate arguments."""
Trial = tuple[int, str, str]
"""Seed, condition and arm of one run."""


def run_arms(recipe: AblateRecipe, start: Start) -> str:
    """Run the arms that have not run yet, seed by seed, and write `results.json`, `table.md` and `differences.png`.

    An interrupted run resumes, and the same command again runs only what is missing. What `results.json` holds is not
    run again, so that file, with the `config.yaml` beside it, moves a comparison to another machine.

    Args:
        recipe: The arms, seeds and comparisons.
        start: Runs a `ligature` command; see `launch.ablation.workers.Workers`.

    Returns:
        The table.

    Raises:
        RecipeError: An arm's recipe is wrong, or the folder holds records of another recipe; nothing has run.
        LigatureError: A command failed.
    """
    folder = Path(recipe.runs) / recipe.name
    for shared in recipe.conditions.values():  # a mistake in any arm must show before the first one runs
        for changes in recipe.arms.values():
            read_stage("pretrain", ["--config", recipe.base, *format_options(shared | changes)])
    check_records(folder, recipe)
    write_recipe(folder / "config.yaml", recipe)  # with its predictions, before anything runs

    path = folder / "results.json"
    results = read_results(path, recipe)
    missing = [
        (seed, condition, arm)
        for seed in recipe.seeds
        for condition in recipe.conditions
        for arm in recipe.arms
        if seed not in results[condition][arm]
    ]
    measured = side_by_side(lambda trial: run_trial(trial, recipe, start), missing, recipe.jobs)
    began = time.monotonic()
    for done, ((seed, condition, arm), measures) in enumerate(zip(missing, measured, strict=True), start=1):
        results[condition][arm][seed] = measures
        write_json(path, results)
        left = (time.monotonic() - began) / done * (len(missing) - done)
        print_heading(f"{done} of {len(missing)} runs, {format_duration(left)} left")
    # Read again: the seeds come in the recipe's order then, as in a run without interruption.
    results = read_results(path, recipe)
    text = format_table(results, recipe)
    write_text(folder / "table.md", text + "\n")
    draw(results, recipe, folder / "differences.png")
    print_heading("the table")
    return text


def run_trial(trial: Trial, recipe: AblateRecipe, start: Start) -> dict[str, float]:
    """Pretrain and score one arm with one seed in one condition, unless its record exists.

    Returns:
        Its measures; see `read_measures`.
    """
    seed, condition, arm = trial
    folder = Path(recipe.runs) / recipe.name
    name = "-".join(part for part in (condition, arm, f"seed{seed}") if part)
    record = folder / f"{name}.json"
    if not record.is_file():
        launcher = ("launch", "local", "--nproc", str(recipe.processes)) if recipe.processes > 1 else ()
        keys = {"name": name, "runs": str(folder), "training.seed": seed}
        keys |= recipe.conditions[condition] | recipe.arms[arm]
        start(*launcher, "pretrain", "--config", recipe.base, *format_options(keys))
        evaluation = {
            "checkpoint": _last_checkpoint(folder / name),
            "data": recipe.data,
            "device": "auto",
            "dataset": recipe.name,
            "split": "test",
            "out": record,
        }
        start("evaluate", *format_options(evaluation))
    return read_measures(record, folder / name, recipe)


def read_measures(record: Path, run_folder: Path, recipe: AblateRecipe) -> dict[str, float]:
    """Return the measures of a run: the mean reciprocal rank and, where the recipe names scenes, codeword information.

    Args:
        record: The run's score record.
        run_folder: The run's folder.
        recipe: The ablation's recipe.
    """
    scores = read_json(record)
    directions = ("image_to_text", "text_to_image")
    measures = {"MRR": sum(scores[direction]["mean_reciprocal_rank"] for direction in directions) / 2}
    if recipe.scenes:
        path = record.with_suffix(".information.json")
        if not path.is_file():
            from launch.ablation.codeword_information import information_of_run

            write_json(path, information_of_run(_last_checkpoint(run_folder), recipe.data, recipe.scenes))
        bits = read_json(path)
        if bits:  # empty for a model without a codebook
            measures["MI"] = sum(bits.values())
            measures |= {f"MI {name}": value for name, value in bits.items()}
    return measures


def _last_checkpoint(run_folder: Path) -> Path:
    """Return the last checkpoint: the best one is chosen by validation, so its age differs between arms."""
    checkpoints = run_folder / "checkpoints"
    return resolve_pointer(checkpoints, "latest") or checkpoints


def read_results(path: Path, recipe: AblateRecipe) -> Results:
    """Return what `results.json` holds of the recipe's arms, with the seeds in the recipe's order."""
    stored = read_json(path) if path.is_file() else {}
    results: Results = {}
    for condition in recipe.conditions:
        results[condition] = {}
        for arm in recipe.arms:
            measured = stored.get(condition, {}).get(arm, {})
            results[condition][arm] = {seed: measured[str(seed)] for seed in recipe.seeds if str(seed) in measured}
    return results


def check_records(folder: Path, recipe: AblateRecipe) -> None:
    """Check that the folder's records belong to this recipe. Arms, comparisons, conditions and seeds may be added.

    Raises:
        RecipeError: The records were made by another recipe or under other predictions.
    """
    if not (folder / "config.yaml").is_file():
        if (folder / "results.json").is_file():
            raise RecipeError(
                f"{folder} holds results.json without the config.yaml that it was made by; copy that file there too"
            )
        return
    before = load_recipe(AblateRecipe, folder / "config.yaml")
    for field in dataclasses.fields(before):
        old, new = getattr(before, field.name), getattr(recipe, field.name)
        if field.name == "comparisons":
            old, new = _flatten(old), _flatten(new)
        if isinstance(old, dict):
            kept = all(name in new and new[name] == value for name, value in old.items())
        else:
            kept = set(old) <= set(new) if isinstance(old, list) else old == new
        # Neither the folder nor the number of runs at a time changes a result.
        if not kept and field.name not in ("runs", "jobs"):
            raise RecipeError(
                f"{folder} holds records of another recipe ({field.name}: {old} -> {new}); choose another --name, or remove it"
            )


def _flatten(comparisons: dict[str, Comparison]) -> dict[tuple[str, str], str]:
    """Return (comparison, arm) -> its prediction, and (comparison, "") -> its baseline."""
    return {
        (name, arm): prediction
        for name, comparison in comparisons.items()
        for arm, prediction in {"": comparison.baseline, **comparison.arms}.items()
    }


def format_options(keys: dict[str, Any]) -> list[str]:
    """Return keys and values as the options of a command line."""
    options = []
    for key, value in keys.items():
        options += [f"--{key}", str(value) if isinstance(value, (str, Path)) else json.dumps(value)]
    return options
