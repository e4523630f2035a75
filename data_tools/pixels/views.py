"""Draw the random numbers of an image's views: crop, mirroring and operations.

transforms.py applies them in the loader's workers, packed.py on the device.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from data_tools.config import AugmentConfig

RATIOS = (3 / 4, 4 / 3)
"""Narrowest and widest crop, as width divided by height."""
STRONGEST = {
    "identity": 0.0,
    "shear_x": 0.3,
    "shear_y": 0.3,
    "translate_x": 150 / 331,
    "translate_y": 150 / 331,
    "rotate": 30.0,
    "brightness": 0.9,
    "sharpness": 0.9,
    "auto_contrast": 0.0,
    "equalize": 0.0,
}
"""RandAugment's operations and their strength at magnitude 10, of either sign.

Shears are slopes, translations shares of the side, rotations degrees, brightness and sharpness shares. Operations that
change hue or invert are left out, because captions name colours (ALBEF's list).
"""


@dataclass(frozen=True, slots=True)
class View:
    """How one view is made of an image: a box in its pixels is resized to a square, then changed."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False
    operations: tuple[tuple[str, float], ...] = ()
    """Name and signed strength of each operation, in the order they are applied."""


def draw_views(size: tuple[int, int], augment: AugmentConfig, views: int, seed: int) -> list[View]:
    """Draw the views of an image. They are a function of the arguments; the first ones do not depend on `views`.

    Args:
        size: Height and width of the image, in pixels.
        augment: The recipe's augmentation.
        views: How many to draw.
        seed: Decides the draws.
    """
    # Python promises the same numbers in every version; the generators of numpy and torch do not.
    draw = random.Random(seed)
    drawn = []
    for _ in range(views):
        box = (0, 0, *size)
        if augment.crop_scale[0] < 1:
            box = _draw_box(*size, (augment.crop_scale[0], augment.crop_scale[1]), draw)
        mirrored = augment.flip and draw.random() < 0.5
        operations = tuple(_draw_operation(augment.magnitude, draw) for _ in range(augment.operations))
        drawn.append(View(*box, mirrored, operations))
    return drawn


def _draw_box(height: int, width: int, scale: tuple[float, float], draw: random.Random) -> tuple[int, int, int, int]:
    """Draw a crop (top, left, height, width) as torchvision's RandomResizedCrop does.

    The area is uniform in `scale`, the ratio uniform in its logarithm.
    """
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw.random())
        ratio = math.exp(math.log(RATIOS[0]) + math.log(RATIOS[1] / RATIOS[0]) * draw.random())
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            return _draw_integer(height - tall, draw), _draw_integer(width - wide, draw), tall, wide
    # Ten boxes did not fit, because the image is long and narrow. It gets the largest central box.
    ratio = min(max(width / height, RATIOS[0]), RATIOS[1])
    tall, wide = max(1, min(height, round(width / ratio))), max(1, min(width, round(height * ratio)))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _draw_integer(limit: int, draw: random.Random) -> int:
    """Draw a whole number from 0 to `limit`, both included."""
    # Python promises stable numbers of `random()` alone; how `randrange` uses it may change.
    return int(draw.random() * (limit + 1))


def _draw_operation(magnitude: int, draw: random.Random) -> tuple[str, float]:
    name = list(STRONGEST)[_draw_integer(len(STRONGEST) - 1, draw)]
    strength = STRONGEST[name] * magnitude / 10
    return name, strength if draw.random() < 0.5 else -strength
