"""`ligature report RUN`: one HTML file of a run with nothing to fetch: curves, the codebook's use and content, word maps."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from data_tools.in_order.collection import Collection
from finetune.report.codewords import codebook_html
from finetune.report.page_parts import figure_html, note_html
from finetune.report.word_map_figures import word_maps_html
from pretrain.config import PretrainRecipe
from pretrain.encode import encode_collection
from pretrain.model.alignment_model import IMAGE, TEXT
from pretrain.weights.load import ImageTextModel, load_model
from runtime.checkpoint import resolve_pointer
from runtime.errors import DataError
from runtime.figures import new_figure
from runtime.files import read_json
from runtime.metrics import read_metrics
from runtime.page import escape, write_page
from runtime.ranks import Ranks
from runtime.recipe import load_recipe

CURVES = {
    "Losses": ["loss", "contrastive", "matching", "masked_language", "codebook", "levels"],
    "Validation R@K, %": [
        f"validation/{direction}_R@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)
    ],
    "Teacher and student: |student - teacher| / |student|": ["teacher_distance"],
    "Temperature": ["temperature"],
    "Matching accuracy": ["matching_accuracy"],
    "Codebook perplexity, and effective codes a sample": ["codebook/perplexity", "codebook/effective_codes"],
    "Dead codewords, churn, largest share": ["codebook/dead", "codebook/churn", "codebook/largest_share"],
    "Transport: errors of the marginals": ["codebook/row_error", "codebook/column_error"],
    "Transport cost, and prediction of codewords": ["transport_cost", "codeword_prediction"],
    "Gradient norm": ["gradient_norm"],
    "Learning rate": ["lr"],
    "Samples a second": ["samples_per_second"],
}
"""Title of a panel -> names of its figures in metrics.jsonl, without `train/`. A panel without logged figures is left out."""
LOGARITHMIC = ("Transport: errors", "Gradient norm")
"""Panels with these titles have a logarithmic axis where all values are above 0."""
MARKED_POINTS = 12
"""A curve of fewer points shows each as a dot."""
STYLE = """
.curves { --cell: 340px } .panel, .wide { padding: 10px 12px } .panel img, .wide img { display: block; width: 100% }
.wide { overflow-x: auto } .wide img { min-width: 600px; max-width: none }
figcaption { font-size: 13px; margin-bottom: 6px; overflow-wrap: anywhere }
.codewords { --cell: 340px } .codeword { padding: 10px 12px; overflow-wrap: anywhere }
.thumb { width: calc((100% - 24px) / 6); margin: 4px 4px 4px 0; border-radius: 4px }
.maps { display: flex; flex-wrap: wrap; gap: 6px } .maps figure { width: 98px; overflow: hidden }
.map { display: block; width: 96px; height: 96px } .maps figcaption { text-align: center; font-size: 12px; margin: 2px 0 4px }
@media (prefers-color-scheme: dark) { .panel img, .wide img { filter: invert(.9) hue-rotate(180deg) } }
"""
"""The plots are drawn on white; in dark mode their colours are turned around, hues kept."""


def write_report(run: Path, out: Path | None = None, data: str | None = None, limit: int = 1000) -> Path:
    """Write the page of a run and return its path.

    Args:
        run: the run's folder.
        out: the page to write; None: `report.html` in the run's folder.
        data: shard folder for codewords and word maps; None: the run's validation data.
        limit: images of `data` to read at most.

    Raises:
        DataError: the folder holds no run, or nothing is logged yet.
    """
    if not (run / "config.yaml").is_file():
        raise DataError(f"{run} holds no run (no config.yaml); give a run's folder")
    metrics = read_metrics(run)
    if not metrics:
        raise DataError(f"{run} has nothing in metrics.jsonl yet; report it once it has taken a step")
    # Only a recipe of fine-tuning has a head. Its text is enough: a damaged recipe is then named as what it is.
    text = (run / "config.yaml").read_text(encoding="utf-8")
    recipe = None if re.search(r"^head:", text, re.MULTILINE) else load_recipe(PretrainRecipe, run / "config.yaml")
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        _state_html(run, metrics),
        *_curves_html(metrics, list(recipe.objectives.others) if recipe else []),
    ]
    data = data or (recipe.data.validation if recipe else None)
    if recipe is None:
        parts.append(note_html("This is not a pretraining run: the page has its curves only."))
    elif not any(resolve_pointer(run / "checkpoints", name) for name in ("best", "latest")):
        parts.append(note_html("There is no checkpoint yet: the page has curves only."))
    elif not data or not Path(data).exists():
        parts.append(
            note_html(
                f"There is no data to look at (data.validation is {data!r}); give a shard folder with --data to see codewords "
                "and word maps."
            )
        )
    else:
        parts += _model_html(run, data, limit)
    out = out or run / "report.html"
    write_page(out, run.name, parts, STYLE)
    return out


def _state_html(run: Path, metrics: list[dict[str, float]]) -> str:
    """Return the run's step, best validation and versions."""
    last = int(metrics[-1]["step"])
    state = "finished" if (run / "finished.json").is_file() else "not finished"
    lines = [f"step {last:,}, {state}"]
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


def _curves_html(metrics: list[dict[str, float]], other_objectives: list[str]) -> list[str]:
    """Return a panel for each entry of CURVES. `other_objectives`: names of objectives that the user registered."""
    panels = []
    for title, names in CURVES.items():
        series = {}
        for name in [*names, *(other_objectives if title == "Losses" else [])]:
            key = name if name.startswith("validation/") else f"train/{name}"
            points = [(line["step"], line[key]) for line in metrics if key in line]
            if points:
                series[name.removeprefix("validation/").removeprefix("codebook/")] = points
        if series:
            panels.append(_panel_html(title, series))
    return ["<h2>Curves</h2>", f"<div class='grid curves'>{''.join(panels)}</div>"]


def _panel_html(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    """Return one panel. `series`: label -> points (step, value)."""
    figure, ((axis,),) = new_figure(figsize=(5, 3))
    for name, points in series.items():
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < MARKED_POINTS else None
        axis.plot(steps, values, label=name.replace("_", " "), linewidth=1.3, marker=marker, markersize=3)
    if title.startswith(LOGARITHMIC) and all(value > 0 for points in series.values() for _, value in points):
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=7, frameon=False)
    return figure_html(figure, title)


def _model_html(run: Path, data: str, limit: int) -> list[str]:
    """Return the sections on the codebook and on word maps, from the data's first `limit` images."""
    model = load_model(run)
    collection = Collection(data)
    encodings = encode_collection(model.network, model.tokenizer, collection, Ranks())
    images = min(limit, len(collection))
    captions = int((collection.caption_image < images).sum())
    pixels = _read_pixels(model, collection, images)
    parts = []
    if model.network.codebook is not None:
        codewords = model.network.codewords().cpu()
        image = model.network.codebook_features(encodings.image[:images], IMAGE)
        text = model.network.codebook_features(encodings.text[:captions], TEXT)
        parts += codebook_html(image, text, codewords, collection.captions[:captions], pixels, data)
    if model.network.config.fusion.layers:
        parts += ["<h2>Where the fusion encoder looks for a word</h2>", *word_maps_html(model, collection, pixels)]
    return parts


def _read_pixels(model: ImageTextModel, collection: Collection, count: int) -> Tensor:
    """Return the first images as the model sees them, (count, 3, size, size) uint8."""
    transform = model.transform
    return torch.cat(list(collection.images(transform, range(count), 64, 0)))
