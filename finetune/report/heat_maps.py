"""Where in the image HAT's words look: one picture, a row a level, a column a word."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_tools.pixels.decode import decode_image
from data_tools.pixels.transforms import EvaluationTransform
from finetune.heads.hat import LoadedHat
from finetune.heads.stacked_attention import word_attention
from runtime.errors import DataError, RecipeError
from runtime.files import replaced_file


@torch.no_grad()
def attention_maps(hat: LoadedHat, image: Image.Image, caption: str) -> tuple[list[str], list[np.ndarray]]:
    """Each word's attention over the image, by the model's own direction and at each of its levels.

    t-i: the weights with which the word reads the regions, summing to 1. i-t: the share of itself that each region gives to the
    word, against the caption's other words.

    Returns:
        The caption's words and pieces, [CLS] and [SEP] left out, and for each level an array (words, rows, columns).
    """
    if hat.model.config.attention == "mean":
        raise RecipeError(f"{hat.folder} compares mean tokens (hat.attention is `mean`): there is no attention to show")
    ids, mask = hat.tokenizer([caption])
    if hat.tokenizer.count_truncated([caption]):
        print(f"the caption is longer than {hat.tokenizer.caption_tokens} tokens: its end is not read", file=sys.stderr)
    pixels = EvaluationTransform(hat.model.encoders.image_size)(image)[None]
    levels = zip(hat.model.image_levels(pixels), hat.model.text_levels(ids, mask), strict=True)
    maps = []
    for regions, words in levels:
        found = word_attention(regions[0], words[0], hat.model.config.direction, hat.model.config.sharpness)
        side = math.isqrt(found.shape[1])
        assert side * side == found.shape[1], "the encoders take square images"
        maps.append(found[1:-1].reshape(-1, side, side).numpy())
    names = [hat.tokenizer.pipeline.id_to_token(number) or "?" for number in ids[0, 1:-1].tolist()]
    return names, maps


def draw_heat_maps(checkpoint: str, image: Path, caption: str, out: Path) -> None:
    """Write the picture (PNG). Raises DataError for an image that cannot be read or a caption without a known word."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    try:
        shown = decode_image(image.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{image} cannot be read ({error}); give a JPEG, PNG or WebP file") from error
    hat = LoadedHat(checkpoint)
    names, maps = attention_maps(hat, shown, caption)
    if not names:
        raise DataError("the caption has no word; give one in quotes")
    size = hat.model.encoders.image_size
    square = np.asarray(shown.resize((size, size)))
    figure, axes = pyplot.subplots(
        len(maps), 1 + len(names), figsize=(1.5 * (1 + len(names)), 1.75 * len(maps) + 0.6), squeeze=False
    )
    for row, (level, (text, picture)) in enumerate(zip(maps, hat.model.pairs, strict=True)):
        axes[row][0].imshow(square)
        axes[row][0].set_ylabel(f"text layer {text}\nimage level {picture}", fontsize=8)
        for column, (name, weights) in enumerate(zip(names, level, strict=True), start=1):
            axis = axes[row][column]
            axis.imshow(square)
            # Of a word's own range: how peaked it is stands beside its name.
            axis.imshow(weights, extent=(0, size, size, 0), cmap="inferno", alpha=0.6, interpolation="bicubic")
            if row == 0:
                axis.set_title(name, fontsize=9)
            share = weights.max() / max(weights.mean(), 1e-12)
            axis.set_xlabel(f"peak {share:.1f} x mean", fontsize=7)
        for axis in axes[row]:
            axis.set_xticks([])
            axis.set_yticks([])
    way = "words attend to regions" if hat.model.config.direction == "text_to_image" else "regions attend to words"
    figure.suptitle(f"{hat.model.name} ({hat.training}): {way}; colours by each map's own range", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    with replaced_file(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
