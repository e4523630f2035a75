"""Word maps on a run's page: for each word of a caption, the image with a heat map of where the model looks.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.in_order.collection import Collection
from finetune.heads.hat_model import LoadedHat
from finetune.report.heat_maps import attention_maps
from finetune.report.page_parts import image_url
from pretrain.weights.load import ImageTextModel
from pretrain.word_maps import word_maps
from runtime.page import escape

IMAGES = 6
"""Images whose first caption is mapped."""
COLOURS = "inferno"
"""matplotlib's name of the colour map: perceptually uniform, dark to bright also in grey and for the colour-blind."""
IMAGE_SHARE = 0.4
"""How much of the image, in grey, shows through its colours."""
MID_GREY = 128.0
"""Mean brightness of the image under the colours, and brightness under the legend's."""
GRAD_CAM = "Grad-CAM: cross-attention times the gradient of the matching logit, mean over heads."
HAT = "HAT's attention between words and regions, a row for each of its levels."
STYLE = """
.maps { display: flex; flex-wrap: wrap; gap: 6px; margin-bottom: 4px } .maps figure { width: 98px; overflow: hidden; break-inside: avoid }
.map { display: block; width: 96px; height: 96px } .maps figcaption { text-align: center; font-size: 12px; margin: 2px 0 4px; overflow-wrap: anywhere }
.legend { display: flex; align-items: center; gap: 8px; flex-wrap: wrap; font-size: 13px; color: var(--soft); margin: 0 0 10px }
.legend i { width: 160px; height: 12px; border-radius: 3px; print-color-adjust: exact; -webkit-print-color-adjust: exact }
"""


def word_maps_html(model: ImageTextModel, collection: Collection, pixels: Tensor) -> list[str]:
    """Return the first caption of some images, with the matching probability and a heat map for each word.

    Args:
        model: a model with a fusion encoder.
        collection: the images and their captions.
        pixels: the first images of the collection, (images, 3, size, size) uint8.
    """
    parts = ["<h2>Where the fusion encoder looks for a word</h2>", _legend_html(GRAD_CAM)]
    for number in _spread(len(pixels)):
        parts.append(_matched_caption_html(model, pixels[number], _first_caption(collection, number)))
    return parts


def hat_maps_html(hat: LoadedHat, collection: Collection, limit: int) -> list[str]:
    """Return the first caption of some images with a heat map for each word at each of HAT's levels.

    Args:
        hat: a HAT that attends.
        collection: the images and their captions.
        limit: images of the collection to choose from.
    """
    parts = ["<h2>Where HAT's words look</h2>", _legend_html(HAT)]
    size = hat.model.encoders.image_size
    for number in _spread(min(limit, len(collection))):
        picture = collection[number]
        if not isinstance(picture, Image.Image):
            raise picture  # the DataError of an image that cannot be read
        caption = _first_caption(collection, number)
        image = torch.from_numpy(np.array(picture.resize((size, size)))).permute(2, 0, 1)
        names, levels = attention_maps(hat, picture, caption)
        parts.append(f"<p>{escape(caption)}</p>")
        for (text_layer, image_level), level in zip(hat.model.pairs, levels, strict=True):
            cells = [_cell(image, f"text {text_layer}, image {image_level}", "the image")]
            cells += [
                _cell(overlay_heat(image, torch.from_numpy(heat)), name, "")
                for name, heat in zip(names, level, strict=True)
            ]
            parts.append(f"<div class=maps>{''.join(cells)}</div>")
    return parts


def _spread(images: int) -> range:
    """Return IMAGES numbers, or as many as there are, spread over the images."""
    return range(0, images, max(1, math.ceil(images / IMAGES)))


def _first_caption(collection: Collection, number: int) -> str:
    return collection.captions[int((collection.caption_image == number).argmax())]


def _matched_caption_html(model: ImageTextModel, image: Tensor, caption: str) -> str:
    """Return one image (3, size, size) and its caption, word by word."""
    ids, mask = (part.to(model.device) for part in model.tokenizer([caption]))
    batch = image[None].to(model.device)
    heat = word_maps(model.network, batch, ids, mask)[0].cpu()
    probability = float(model.match(batch, [caption])[0])
    tokens = [model.tokenizer.pipeline.id_to_token(int(token)) for token in ids[0]]
    cells = [_cell(image, f"match {probability:.2f}", "the image")]
    for token, word_heat in zip(tokens[1:-1], heat[1:-1], strict=True):  # without [CLS] and [SEP]
        cells.append(_cell(overlay_heat(image, word_heat), token or "", ""))
    return f"<p>{escape(caption)}</p><div class=maps>{''.join(cells)}</div>"


def _cell(image: Tensor, label: str, description: str) -> str:
    return (
        f"<figure><img class=map src='{image_url(image)}' alt='{description}'>"
        f"<figcaption>{escape(label)}</figcaption></figure>"
    )


def overlay_heat(image: Tensor, heat: Tensor) -> Tensor:
    """Return an image in grey under the colours of a heat map.

    Args:
        image: (3, size, size) uint8.
        heat: (rows, columns), 0 or more; it is scaled to its own maximum.

    Returns:
        (3, size, size) uint8.
    """
    size = image.shape[-2:]
    enlarged = torch.nn.functional.interpolate(heat[None, None].float(), size, mode="bicubic", align_corners=False)[
        0, 0
    ]
    weight = (enlarged / heat.max().clamp(min=1e-12)).clamp(0, 1)
    colours = 255 * colours_of(weight).permute(2, 0, 1)
    # In grey, so that every hue is the map's, and as bright as the legend on the whole, so that colours compare between images.
    grey = (image * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    grey = (MID_GREY + grey - grey.mean()).clamp(0, 255)
    return (IMAGE_SHARE * grey + (1 - IMAGE_SHARE) * colours).round().clamp(0, 255).to(torch.uint8)


def colours_of(weight: Tensor) -> Tensor:
    """Return the colours of weights from 0 to 1: (n, …) -> (n, …, 3), red, green and blue from 0 to 1."""
    import matplotlib

    return torch.from_numpy(matplotlib.colormaps[COLOURS](weight.numpy())[..., :3]).float()


def _legend_html(method: str) -> str:
    """Return the colour map over mid grey, as it looks on an image, from no attention to a word's own maximum."""
    ramp = IMAGE_SHARE * MID_GREY + (1 - IMAGE_SHARE) * 255 * colours_of(torch.linspace(0, 1, 16))
    stops = ", ".join(f"rgb({', '.join(str(round(part)) for part in colour)})" for colour in ramp.tolist())
    return (
        f"<p class=legend>0 <i style='background:linear-gradient(to right, {stops})'></i> each word's own maximum "
        f"<span>{escape(method)}</span></p>"
    )
