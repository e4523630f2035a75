"""`ligature report RUN`: one HTML file of a pretraining run, with nothing to fetch: curves, the codebook's health and content, word maps."""

from __future__ import annotations

import base64
import html
import io
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data_tools.in_order.collection import Collection
from data_tools.pixels.decode import data_url
from data_tools.pixels.transforms import EvaluationTransform
from pretrain.config import PretrainRecipe
from pretrain.encode import encode_collection
from pretrain.weights.load import ImageTextModel, load_model
from pretrain.word_maps import word_maps
from runtime.checkpoint import resolve_pointer
from runtime.errors import DataError
from runtime.files import read_json, write_text
from runtime.metrics import read_metrics
from runtime.ranks import Ranks
from runtime.recipe import load_recipe

CURVES = {
    "Losses": ["loss", "contrastive", "matching", "masked_language", "codebook", "levels"],
    "Validation R@K, %": [f"validation/{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)],
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
"""Title -> figures of metrics.jsonl (`train/` left out). A panel whose figures were not logged is left out."""
WORD = re.compile(r"\w+")
LOGARITHMIC = ("Transport: errors", "Gradient norm")
CODEWORDS, NEAREST, MAPPED = 12, 6, 6
"""Codewords shown, images of each, and captions whose words are mapped."""


@dataclass
class Codeword:
    number: int
    images: list[int]
    """Nearest images, nearest first."""
    words: list[str]
    """Words said more of its images' captions than of others'."""
    share: float
    """Of all images and captions, those it is nearest to."""


def write_report(run: Path, out: Path | None = None, data: str | None = None, limit: int = 1000) -> Path:
    """Write the page. -> its path, `report.html` in the run's folder unless said otherwise.

    data: shard folder for codewords and word maps (None: the run's validation data); limit: images of it to look at.
    Raises DataError where the folder holds no run, or nothing was logged.
    """
    if not (run / "config.yaml").is_file():
        raise DataError(f"{run} is no run's folder: it has no config.yaml")
    metrics = read_metrics(run)
    if not metrics:
        raise DataError(f"{run} has nothing in metrics.jsonl yet; there is nothing to report")
    tuned = re.search(
        r"^head:", (run / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE
    )  # fine-tuning alone has one
    recipe = None if tuned else load_recipe(PretrainRecipe, run / "config.yaml")
    parts = [header(run, metrics), *curves(metrics, list(recipe.objectives.others) if recipe else [])]
    where = data or (recipe.data.validation if recipe else None)
    if recipe is None:
        parts.append(note("This is no pretraining run: curves alone."))
    elif not any(resolve_pointer(run / "checkpoints", name) for name in ("best", "latest")):
        parts.append(note("There is no checkpoint yet: curves alone."))
    elif not where or not Path(where).exists():
        parts.append(
            note(
                f"No data to look at (data.validation is {where!r}); give a shard folder with --data for codewords and word maps."
            )
        )
    else:
        parts += contents(run, where, limit)
    out = out or run / "report.html"
    write_text(out, page(run.name, parts))
    return out


def header(run: Path, metrics: list[dict[str, float]]) -> str:
    last = int(metrics[-1]["step"])
    state = "finished" if (run / "finished.json").is_file() else "not finished"
    lines = [f"step {last:,}, {state}"]
    scores = [line for line in metrics if "validation/rsum" in line]
    if scores:
        best = max(scores, key=lambda line: line["validation/rsum"])
        lines.append(
            f"best validation at step {int(best['step']):,}: R@1 {best['validation/image_to_text_R@1']:.1f} image to text, "
            f"{best['validation/text_to_image_R@1']:.1f} text to image"
        )
    if (run / "environment.json").is_file():
        about = read_json(run / "environment.json")
        lines.append(f"torch {about['versions'].get('torch')}, commit {str(about.get('commit'))[:12]}")
    return "<p class=about>" + "<br>".join(html.escape(line) for line in lines) + "</p>"


def curves(metrics: list[dict[str, float]], own_losses: list[str]) -> list[str]:
    """own_losses: names of objectives that are not ours."""
    figures = []
    for title, names in CURVES.items():
        series = {}
        for name in [*names, *(own_losses if title == "Losses" else [])]:
            key = name if name.startswith("validation/") else f"train/{name}"
            points = [(line["step"], line[key]) for line in metrics if key in line]
            if points:
                series[name.removeprefix("validation/").removeprefix("codebook/")] = points
        if series:
            figures.append(panel(title, series))
    return ["<h2>Curves</h2>", "<div class=grid>" + "".join(figures) + "</div>"]


def panel(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(5, 3))
    for name, points in series.items():
        steps, values = zip(*points, strict=True)
        axis.plot(
            steps,
            values,
            label=name.replace("_", " "),
            linewidth=1.3,
            marker="o" if len(points) < 12 else None,
            markersize=3,
        )
    if title.startswith(LOGARITHMIC) and all(value > 0 for points in series.values() for _, value in points):
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if len(series) > 1:
        axis.legend(fontsize=7, frameon=False)
    return figure_html(figure, title)


def contents(run: Path, where: str, limit: int) -> list[str]:
    """The codebook's usage, its most used codewords, and word maps, on the data's first images."""
    model = load_model(run)
    collection = Collection(where)
    encodings = encode_collection(model.network, model.tokenizer, collection, Ranks())
    images = min(limit, len(collection))
    captions = int((collection.caption_image < images).sum())
    image, text = encodings.image[:images], encodings.text[:captions]
    shown = thumbnails(model, collection, images)
    parts = []
    if model.network.codebook is not None:
        codewords = model.network.codewords().cpu()
        of_image, of_text = (features @ codewords.T for features in (image, text))
        parts += ["<h2>Codebook</h2>", usage(of_image.argmax(-1), of_text.argmax(-1), len(codewords), where)]
        found = most_used(of_image, of_text, collection.captions[:captions])
        parts += ["<h2>Most used codewords</h2>", *(codeword_html(one, shown) for one in found)]
    if model.network.config.fusion.layers:
        parts += ["<h2>Where the fusion encoder looks for a word</h2>", *maps(model, collection, shown)]
    return parts


def thumbnails(model: ImageTextModel, collection: Collection, count: int) -> Tensor:
    """(count, 3, size, size) uint8 as the model sees them."""
    transform = EvaluationTransform(model.network.config.image.image_size)
    return torch.cat(list(collection.images(transform, range(count), 64, 0)))


def usage(of_image: Tensor, of_text: Tensor, codewords: int, where: str) -> str:
    """How many images and captions are nearest to each codeword, the most used first."""
    counts = torch.stack([torch.bincount(one, minlength=codewords) for one in (of_image, of_text)])
    order = counts.sum(0).argsort(descending=True)
    figure, axis = _pyplot().subplots(figsize=(10.4, 2.6))
    axis.bar(range(codewords), counts[0][order] / len(of_image) * 100, width=1.0, label="images", alpha=0.75)
    axis.bar(
        range(codewords), counts[1][order] / len(of_text) * -100, width=1.0, label="captions (downward)", alpha=0.75
    )
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xlabel("codewords, the most used first")
    axis.set_ylabel("% nearest to it")
    axis.legend(fontsize=8, frameon=False)
    share = counts.sum(0) / counts.sum()
    perplexity = float((-torch.special.xlogy(share, share).sum()).exp())
    dead = int((counts.sum(0) == 0).sum())
    title = f"{codewords:,} codewords on {len(of_image):,} images and {len(of_text):,} captions: perplexity {perplexity:.1f}, {dead} dead"
    return figure_html(figure, title, "wide") + f"<p class=small>{html.escape(where)}</p>"


def most_used(of_image: Tensor, of_text: Tensor, captions: list[str]) -> list[Codeword]:
    """of_image, of_text: similarities (images or captions, codewords)."""
    image_code, text_code = of_image.argmax(-1), of_text.argmax(-1)
    counts = torch.bincount(torch.cat([image_code, text_code]), minlength=of_image.shape[1])
    everywhere = Counter(word for caption in captions for word in set(WORD.findall(caption.lower())))
    found = []
    for number in counts.argsort(descending=True)[:CODEWORDS].tolist():
        if not counts[number]:
            break
        own = [captions[row] for row in (text_code == number).nonzero().flatten().tolist()]
        said = Counter(word for caption in own for word in set(WORD.findall(caption.lower())))
        # How much more often than everywhere; one caption more everywhere keeps rare words from winning by chance.
        lift = {
            word: (count / len(own)) / ((everywhere[word] + 1) / len(captions))
            for word, count in said.items()
            if count > 1
        }
        words = sorted((word for word in lift if lift[word] > 1.2), key=lambda word: -lift[word] * said[word] ** 0.5)[
            :8
        ]
        nearest = of_image[:, number].argsort(descending=True)[:NEAREST].tolist()
        found.append(Codeword(number, nearest, words, float(counts[number]) / len(torch.cat([image_code, text_code]))))
    return found


def codeword_html(one: Codeword, shown: Tensor) -> str:
    pictures = "".join(
        f"<img class=thumb src='{picture(shown[number])}' alt='image {number}'>" for number in one.images
    )
    words = html.escape(", ".join(one.words)) or "no captions of its own"
    return f"<div class=codeword><b>{one.number}</b> <span class=small>{one.share:.1%}</span><br>{pictures}<br><i>{words}</i></div>"


def maps(model: ImageTextModel, collection: Collection, shown: Tensor) -> list[str]:
    """The first caption of some images: a heat map a word, with the matching probability."""
    step = max(1, len(shown) // MAPPED)
    parts = []
    for number in range(0, len(shown), step)[:MAPPED]:
        caption = collection.captions[int((collection.caption_image == number).argmax())]
        ids, mask = (part.to(model.device) for part in model.tokenizer([caption]))
        one = shown[number : number + 1].to(model.device)
        heat = word_maps(model.network, one, ids, mask)[0].cpu()
        probability = float(model.match(one, [caption])[0])
        tokens = [model.tokenizer.pipeline.id_to_token(int(token)) for token in ids[0]]
        cells = [
            f"<figure><img class=map src='{picture(shown[number])}' alt='the image'><figcaption>match {probability:.2f}</figcaption></figure>"
        ]
        for token, one_map in zip(tokens[1:-1], heat[1:-1], strict=True):  # without [CLS] and [SEP]
            cells.append(
                f"<figure><img class=map src='{picture(overlay(shown[number], one_map))}' alt=''><figcaption>{html.escape(token or '')}</figcaption></figure>"
            )
        parts.append(f"<p>{html.escape(caption)}</p><div class=maps>{''.join(cells)}</div>")
    parts.append(
        "<p class=small>Grad-CAM: cross-attention times the gradient of the matching logit, mean over heads, each word scaled to its own maximum.</p>"
    )
    return parts


def overlay(pixels: Tensor, heat: Tensor) -> Tensor:
    """A heat map over an image: (3, size, size) uint8; the image darkens where the word does not look."""
    grown = torch.nn.functional.interpolate(heat[None, None], pixels.shape[-2:], mode="bicubic", align_corners=False)[
        0, 0
    ]
    grown = (grown / heat.max().clamp(min=1e-12)).clamp(0, 1)
    red = torch.tensor([255.0, 60.0, 0.0]).view(3, 1, 1)
    return (pixels * (0.35 + 0.35 * grown) + red * (0.45 * grown)).clamp(0, 255).to(torch.uint8)


def picture(pixels: Tensor) -> str:
    """(3, height, width) uint8 -> a data URL, small images enlarged without smoothing."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if image.width < 96:
        image = image.resize((96, 96), Image.Resampling.NEAREST)
    elif image.width > 160:
        image = image.resize((160, 160))
    return data_url(image)


def figure_html(figure: Any, title: str, kind: str = "panel") -> str:
    figure.tight_layout()
    room = io.BytesIO()
    figure.savefig(room, format="png", dpi=110)
    _pyplot().close(figure)
    encoded = base64.b64encode(room.getvalue()).decode()
    return f"<figure class={kind}><figcaption>{html.escape(title)}</figcaption><img src='data:image/png;base64,{encoded}' alt='{html.escape(title)}'></figure>"


def note(text: str) -> str:
    return f"<p class=note>{html.escape(text)}</p>"


def page(name: str, parts: list[str]) -> str:
    style = (
        "body{font:15px/1.45 system-ui,sans-serif;max-width:1120px;margin:2em auto;padding:0 1em;color:#222;background:#fff}"
        "h1{margin-bottom:0}h2{margin:1.6em 0 .4em;border-bottom:1px solid #ddd}.about,.small{color:#666;font-size:13px}"
        ".grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(340px,1fr));gap:12px}figure{margin:0}"
        ".panel img,.wide img{width:100%}figcaption{font-size:13px;color:#333}.note{background:#fff6d6;padding:.6em 1em}"
        ".codeword{display:inline-block;width:330px;vertical-align:top;margin:0 16px 18px 0}.thumb{width:50px;height:50px;margin:2px}"
        ".maps{display:flex;flex-wrap:wrap;gap:6px}.map{width:96px;height:96px}.maps figcaption{text-align:center;font-size:12px}"
    )
    body = "\n".join(parts)
    return f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{html.escape(name)}</title><style>{style}</style>\n<h1>{html.escape(name)}</h1>\n{body}\n</html>\n"


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
