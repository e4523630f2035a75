"""`ligature report RUN`: one HTML file of a run with nothing to fetch: scores, curves, recipe, errors, codebook, word maps."""

from __future__ import annotations

from pathlib import Path

from finetune.report import codewords, recipe_tables, score_tables, svg_chart, word_map_figures
from finetune.report.curve_panels import run_curves_html
from finetune.report.model_sections import model_html
from finetune.report.page_parts import note_html
from finetune.report.recipe_tables import Recipe, read_recipe_of, recipe_html
from finetune.report.score_tables import find_scores, read_scores, scores_html
from finetune.report.troubles import read_sick_steps, troubles_html
from pretrain.config import PretrainRecipe
from runtime.checkpoint import resolve_pointer
from runtime.errors import DataError
from runtime.files import read_json
from runtime.metrics import read_metrics
from runtime.page import escape, write_page

STYLE = "".join(part.STYLE for part in (svg_chart, score_tables, recipe_tables, codewords, word_map_figures))
"""CSS of the pages of runs, after the base style."""


def write_report(
    run: Path, out: Path | None = None, data: str | None = None, limit: int = 1000, scores: list[Path] | None = None
) -> Path:
    """Write the page of a run and return its path.

    Args:
        run: the run's folder.
        out: the page to write; None: `report.html` in the run's folder.
        data: shard folder for codewords and word maps; None: the run's validation data.
        limit: images of `data` to read at most. 0: no codewords and no word maps.
        scores: score records to show besides those found in the run's folder and beside it.

    Raises:
        DataError: the folder holds no run, or nothing is logged yet.
        LigatureError: a score record is none.
    """
    metrics, recipe = read_run(run), read_recipe_of(run)
    sick_steps = read_sick_steps(run)
    records = find_scores(run)
    records += [
        score
        for score in read_scores(scores or [])
        if score.path.resolve() not in {known.path.resolve() for known in records}
    ]
    parts = [
        f"<h1>{escape(run.resolve().name)}</h1>",
        _state_html(run, metrics, recipe),
        *troubles_html(run, sick_steps),
        *scores_html({run.name: records}),
        *run_curves_html(metrics, {entry["step"]: f"step {entry['step']}: {entry['reason']}" for entry in sick_steps}),
        *recipe_html(run, recipe),
    ]
    if limit:
        parts += _model_html(run, data or recipe.data.validation, limit)
    parts.append(f"<script>{svg_chart.SCRIPT}</script>")
    out = out or run / "report.html"
    write_page(out, run.resolve().name, parts, STYLE)
    return out


def read_run(run: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.jsonl.

    Raises:
        DataError: the folder holds no run, or nothing is logged yet.
    """
    if not (run / "config.yaml").is_file():
        raise DataError(f"{run} holds no run (no config.yaml); give a run's folder")
    metrics = read_metrics(run)
    if not metrics:
        raise DataError(f"{run} has nothing in metrics.jsonl yet; report it once it has taken a step")
    return metrics


def _model_html(run: Path, data: str | None, limit: int) -> list[str]:
    """Return the sections that need a checkpoint and data, or a note on which of them is missing."""
    if not any(resolve_pointer(run / "checkpoints", name) for name in ("best", "latest")):
        return [note_html("There is no checkpoint yet, so no codebook and no word maps.")]
    if not data or not Path(data).exists():
        return [
            note_html(
                f"There is no data to look at (data.validation is {data!r}); give a shard folder with --data to see codewords "
                "and word maps."
            )
        ]
    return model_html(run, data, limit)


def describe_kind(recipe: Recipe) -> str:
    """Return what kind of run a recipe is of, in words."""
    if isinstance(recipe, PretrainRecipe):
        return "pretraining"
    return f"fine-tuning of the {recipe.head} head on {recipe.dataset}, from {recipe.checkpoint}"


def _state_html(run: Path, metrics: list[dict[str, float]], recipe: Recipe) -> str:
    """Return the run's kind, step, best validation and versions."""
    last = int(max(line["step"] for line in metrics))
    state = "finished" if (run / "finished.json").is_file() else "not finished"
    lines = [describe_kind(recipe), f"step {last:,}, {state}"]
    validations = [line for line in metrics if "validation/rsum" in line]
    if validations:
        best = max(validations, key=lambda line: line["validation/rsum"])
        lines.append(
            f"best validation at step {int(best['step']):,}: R@1 {best['validation/image_to_text_R@1']:.1f} image to text, "
            f"{best['validation/text_to_image_R@1']:.1f} text to image"
        )
    if (run / "environment.json").is_file():
        environment = read_json(run / "environment.json")
        lines.append(f"torch {environment['versions'].get('torch')}, commit {str(environment.get('commit'))[:12]}")
    return "<p class=soft>" + "<br>".join(escape(line) for line in lines) + "</p>"
