"""`ligature report A B …`: one HTML file that compares runs: scores with paired differences, curves, recipes.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

from pathlib import Path

from finetune.report.curve_panels import compared_curves_html
from finetune.report.recipe_tables import compared_recipes_html, read_recipe_of
from finetune.report.run_page import STYLE, describe_kind, read_run
from finetune.report.score_tables import differences_html, find_scores, scores_html
from finetune.report.svg_chart import COLOURS, SCRIPT
from runtime.errors import RecipeError
from runtime.page import escape, write_page


def write_comparison(runs: list[Path], out: Path) -> Path:
    """Write the page that compares runs and return its path.

    Args:
        runs: folders of two runs or more.
        out: the page to write.

    Raises:
        DataError: a folder holds no run, or nothing is logged in it yet.
        RecipeError: two of the folders are one.
    """
    names = name_runs(runs)
    metrics = {name: read_run(run) for name, run in names.items()}
    recipes = {name: read_recipe_of(run) for name, run in names.items()}
    scores = {name: find_scores(run) for name, run in names.items()}
    title = " and ".join(names) if len(names) == 2 else f"{len(names)} runs"
    rows = "".join(
        f"<tr><th><span class='run{' dashed' * (number >= COLOURS)}' style='--c:var(--c{number % COLOURS})'></span></th><td>{escape(name)}</td>"
        f"<td>{escape(describe_kind(recipes[name]))}</td>"
        f"<td class=number>step {int(max(line['step'] for line in metrics[name])):,}</td>"
        f"<td>{'finished' if (run / 'finished.json').is_file() else 'not finished'}</td></tr>"
        for number, (name, run) in enumerate(names.items())
    )
    parts = [
        f"<h1>{escape(title)}</h1><table>{rows}</table>",
        *scores_html(scores),
        *differences_html(scores),
        *compared_curves_html(metrics),
        *compared_recipes_html(recipes),
        f"<script>{SCRIPT}</script>",
    ]
    style = (
        ".run { display: inline-block; width: 16px; border-top: 3px solid var(--c); vertical-align: middle } "
        ".run.dashed { border-top-style: dotted }"
    )
    write_page(out, title, parts, STYLE + style)
    return out


def name_runs(runs: list[Path]) -> dict[str, Path]:
    """Return the runs by their folders' names, with as many parent folders as it takes to tell them apart.

    Raises:
        RecipeError: two of the folders are one.
    """
    paths = [run.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise RecipeError("a run is named twice; give each run once")
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(paths):
        parts += 1
    return {"/".join(path.parts[-parts:]): run for path, run in zip(paths, runs, strict=True)}
