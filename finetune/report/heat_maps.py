"""`ligature heatmap`: where in an image HAT's words look, as one picture with a row for each level and a column for each word.

Tested in tests/finetune/heads/test_hat.py.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data_tools.pixels.decode import decode_image
from data_tools.pixels.transforms import EvaluationTransform
from finetune.heads.hat_model import LoadedHat
from finetune.heads.stacked_attention import word_attention
from runtime.errors import DataError, RecipeError
from runtime.figures import new_figure, save_figure


@torch.no_grad()
def attention_maps(hat: LoadedHat, image: Image.Image, caption: str) -> tuple[list[str], list[np.ndarray]]:
    """Return each word's attention over the image, by the model's own direction and at each of its levels.

    In direction text to image, a word's weights over the regions sum to 1. In direction image to text, a region's weights over
    the caption's words do, and the map holds each region's weight on the word.

    Args:
        hat: a fine-tuned HAT.
        image: RGB, of any size.
        caption: one caption; words beyond the model's caption tokens are not read.

    Returns:
        The caption's words and word pieces without [CLS] and [SEP], and for each level an array (words, rows, columns).

    Raises:
        RecipeError: the model compares mean tokens and has no attention.
    """
    if hat.model.config.attention == "mean":
        raise RecipeError(
            f"{hat.folder} compares mean tokens (hat.attention is `mean`) and has no attention to show; give another run"
        )
    ids, mask = hat.tokenizer([caption])
    if hat.tokenizer.count_truncated([caption]):
        print(f"the caption is longer than {hat.tokenizer.caption_tokens} tokens: its end is not read", file=sys.stderr)
    pixels = EvaluationTransform(hat.model.encoders.image_size)(image)[None]
    levels = zip(hat.model.image_levels(pixels), hat.model.text_levels(ids, mask), strict=True)
    maps = []
    for regions, words in levels:
        weights = word_attention(regions[0], words[0], hat.model.config.direction, hat.model.config.sharpness)
        side = math.isqrt(weights.shape[1])
        assert side * side == weights.shape[1], "the encoders take square images"
        maps.append(weights[1:-1].reshape(-1, side, side).numpy())  # without [CLS] and [SEP]
    names = [hat.tokenizer.pipeline.id_to_token(number) or "?" for number in ids[0, 1:-1].tolist()]
    return names, maps


def draw_heat_maps(checkpoint: str, image: Path, caption: str, out: Path) -> None:
    """Write the heat maps of a caption's words over an image (PNG).

    Args:
        checkpoint: folder of a HAT run or checkpoint.
        image: a JPEG, PNG or WebP file.
        caption: the caption.
        out: the file to write.

    Raises:
        DataError: the image cannot be read, or the caption has no known word.
    """
    try:
        picture = decode_image(image.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{image} cannot be read ({error}); give a JPEG, PNG or WebP file") from error
    hat = LoadedHat(checkpoint)
    names, maps = attention_maps(hat, picture, caption)
    if not names:
        raise DataError("the caption has no word; give one in quotes")
    size = hat.model.encoders.image_size
    square = np.asarray(picture.resize((size, size)))
    figsize = (1.5 * (1 + len(names)), 1.75 * len(maps) + 0.6)
    figure, axes = new_figure(len(maps), 1 + len(names), figsize=figsize)
    for row, (level, (text_layer, image_level)) in enumerate(zip(maps, hat.model.pairs, strict=True)):
        axes[row][0].imshow(square)
        axes[row][0].set_ylabel(f"text layer {text_layer}\nimage level {image_level}", fontsize=8)
        for column, (name, weights) in enumerate(zip(names, level, strict=True), start=1):
            _draw_map(axes[row][column], square, weights, name if row == 0 else None)
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    direction = (
        "words attend to regions" if hat.model.config.direction == "text_to_image" else "regions attend to words"
    )
    title = f"{hat.model.name} ({hat.training}): {direction}; colours by each map's own range"
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    save_figure(figure, out)


def _draw_map(axis: Any, image: np.ndarray, weights: np.ndarray, name: str | None) -> None:
    """Draw one word's weights (rows, columns) over the image (size, size, 3), with `name` above it unless that is None."""
    axis.imshow(image)
    # Colours span the map's own range, so the label says how peaked it is.
    axis.imshow(weights, extent=(0, len(image), len(image), 0), cmap="inferno", alpha=0.6, interpolation="bicubic")
    if name is not None:
        axis.set_title(name, fontsize=9)
    peak = weights.max() / max(weights.mean(), 1e-12)
    axis.set_xlabel(f"peak {peak:.1f} x mean", fontsize=7)
