"""Word maps on a run's page: for each word of a caption, the image with a heat map of where the fusion encoder looks.

Tested in tests/finetune/report/test_run_page.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data_tools.in_order.collection import Collection
from finetune.report.page_parts import image_url
from pretrain.weights.load import ImageTextModel
from pretrain.word_maps import word_maps
from runtime.page import escape

IMAGES = 6
"""Images whose first caption is mapped."""
METHOD = "Grad-CAM: cross-attention times the gradient of the matching logit, mean over heads, each word scaled to its own maximum."


def word_maps_html(model: ImageTextModel, collection: Collection, pixels: Tensor) -> list[str]:
    """Return the first caption of some images, with the matching probability and a heat map for each word.

    Args:
        model: a model with a fusion encoder.
        collection: the images and their captions.
        pixels: the first images of the collection, (images, 3, size, size) uint8.
    """
    step = max(1, len(pixels) // IMAGES)
    parts = []
    for number in range(0, len(pixels), step)[:IMAGES]:
        caption = collection.captions[int((collection.caption_image == number).argmax())]
        parts.append(_caption_html(model, pixels[number], caption))
    return [*parts, f"<p class=soft>{METHOD}</p>"]


def _caption_html(model: ImageTextModel, image: Tensor, caption: str) -> str:
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
    """Return an image under a heat map: red where the word looks, darker elsewhere.

    Args:
        image: (3, size, size) uint8.
        heat: (rows, columns), 0 or more; it is scaled to its own maximum.

    Returns:
        (3, size, size) uint8.
    """
    size = image.shape[-2:]
    enlarged = torch.nn.functional.interpolate(heat[None, None], size, mode="bicubic", align_corners=False)[0, 0]
    weight = (enlarged / heat.max().clamp(min=1e-12)).clamp(0, 1)
    red = torch.tensor([255.0, 60.0, 0.0]).view(3, 1, 1)
    return (image * (0.35 + 0.35 * weight) + red * (0.45 * weight)).clamp(0, 255).to(torch.uint8)
