"""The curves of a run's page, or of a page that compares runs: which figures share a panel, and in which order they come.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

from finetune.report.svg_chart import COLOURS, Points, Series, chart_html
from runtime.page import escape

CODEBOOK = "Codebook figures"
PANELS = {
    "Losses and scores": {
        "Loss": ["loss"],
        "Validation R@K, %: image to text solid, text to image dashed": [
            f"validation/{direction}_R@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)
        ],
        "Sum of the six recalls": ["validation/rsum"],
        "Parts of the loss": ["contrastive", "matching", "masked_language", "codebook", "levels", "triplet"],
        "Matching accuracy": ["matching_accuracy"],
    },
    "Optimization": {
        "Gradient norm": ["gradient_norm"],
        "Learning rate": ["lr"],
        "Temperature": ["temperature"],
        "Teacher and student: |student - teacher| / |student|": ["teacher_distance"],
        "Weight of the teacher's targets": ["distill_weight"],
    },
    CODEBOOK: {
        "Codebook perplexity, and effective codes a sample": ["codebook/perplexity", "codebook/effective_codes"],
        "Dead codewords": ["codebook/dead"],
        "Churn, and largest share": ["codebook/churn", "codebook/largest_share"],
        "Transport: errors of the marginals": ["codebook/row_error", "codebook/column_error"],
        "Transport cost, and prediction of codewords": ["transport_cost", "codeword_prediction"],
    },
    "Throughput": {
        "Samples a second": ["samples_per_second"],
        "Seconds of a step, of its own work and of waiting for data": [
            "step_seconds",
            "own_work_slowest",
            "own_work_median",
            "data_wait",
        ],
        "Seconds that checkpoints held the run up": ["checkpoint_stall"],
    },
}
"""Heading -> title of a panel -> names of its figures in metrics.jsonl, without `train/`. What is not logged is left out."""
LOGARITHMIC = {"Transport: errors of the marginals", "Gradient norm"}
"""Panels that are logarithmic at first."""
NOT_CURVES = {"step", "train/epoch", "train/slowest_rank"}
OTHERS = "Other figures"
"""Heading of the figures that no panel names, such as those of an objective of the user's own."""
QUIET = ("Throughput", OTHERS)
"""Headings whose figures are shown where they are not 0 throughout."""


def run_curves_html(metrics: list[dict[str, float]], sick_steps: dict[int, str]) -> list[str]:
    """Return the panels of one run, with a curve for each figure.

    Args:
        metrics: lines of metrics.jsonl.
        sick_steps: step -> why it was skipped.
    """
    curves = read_curves(metrics)
    parts = []
    for heading, panels in all_panels(set(curves)).items():
        charts = []
        for title, names in panels.items():
            series = [
                Series(_label(name), curves[key], _colour(name, number), "text_to_image" in name)
                for number, name in enumerate(names)
                if (key := _key(name)) in curves and (heading not in QUIET or _is_used(curves[key]))
            ]
            if series:
                marks = sick_steps if heading in ("Losses and scores", "Optimization") else None
                charts.append(chart_html(title, series, title in LOGARITHMIC, marks))
        parts += _section(heading, charts)
    return parts


def compared_curves_html(runs: dict[str, list[dict[str, float]]]) -> list[str]:
    """Return a panel for each figure that a run has logged, with a curve for each run.

    Args:
        runs: name of a run -> lines of its metrics.jsonl.
    """
    curves = {run: read_curves(metrics) for run, metrics in runs.items()}
    logged = {key for of_run in curves.values() for key in of_run}
    parts = []
    for heading, panels in all_panels(logged).items():
        charts = []
        for title, names in panels.items():
            for name in names:
                series = [
                    Series(run, of_run[_key(name)], number, dashed=number >= COLOURS)
                    for number, (run, of_run) in enumerate(curves.items())
                    if _key(name) in of_run
                ]
                if series and (heading not in QUIET or any(_is_used(curve.points) for curve in series)):
                    of_panel = title if len(names) == 1 else _label(name)
                    charts.append(chart_html(of_panel, series, title in LOGARITHMIC))
        parts += _section(heading, charts)
    return parts


def _section(heading: str, charts: list[str]) -> list[str]:
    return [f"<h2>{escape(heading)}</h2>", f"<div class='grid charts'>{''.join(charts)}</div>"] if charts else []


def read_curves(metrics: list[dict[str, float]]) -> dict[str, Points]:
    """Return the points of each figure in metrics.jsonl: name -> (step, value), in order."""
    curves: dict[str, Points] = {}
    for line in metrics:
        for key, value in line.items():
            if key not in NOT_CURVES:
                curves.setdefault(key, []).append((line["step"], value))
    return curves


def all_panels(logged: set[str]) -> dict[str, dict[str, list[str]]]:
    """Return PANELS, and a panel for each figure that they do not name: the codebook's beside its kin, the rest under OTHERS.

    Args:
        logged: names in metrics.jsonl.
    """
    named = {_key(name) for panels in PANELS.values() for names in panels.values() for name in names}
    all_of_them = {heading: dict(panels) for heading, panels in PANELS.items()} | {OTHERS: {}}
    for key in sorted(logged - named):
        heading = CODEBOOK if key.startswith(("train/codebook/", "validation/codebook_")) else OTHERS
        place = "validation: " if key.startswith("validation/") else ""
        all_of_them[heading][place + _label(key)] = [key.removeprefix("train/")]
    return all_of_them


def _is_used(points: Points) -> bool:
    return any(value != 0 for _, value in points)


def _key(name: str) -> str:
    return name if name.startswith("validation/") else f"train/{name}"


def _label(name: str) -> str:
    """Return a figure's name in words."""
    name = name.removeprefix("train/").removeprefix("codebook/")
    return name.removeprefix("validation/").replace("_", " ")


def _colour(name: str, number: int) -> int:
    """Return the number of a curve's colour. Both directions of a recall share one: the dashes tell them apart."""
    return number % 3 if name.startswith("validation/") and "_R@" in name else number
