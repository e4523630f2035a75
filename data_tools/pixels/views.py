"""What is drawn for the views of one image: crop, mirroring, operations. Numbers only: who applies them, and where, is told
in transforms.py (the workers) and packed.py (the device)."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from data_tools.config import AugmentConfig

RATIOS = (3 / 4, 4 / 3)
"""Narrowest and widest crop, width by height."""
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
"""RandAugment's operations and their strength at magnitude 10, of either sign: slope, slope, share of the side, the same,
degrees, share, share. Those that change hue or invert are left out, since captions name colours (ALBEF's list)."""


@dataclass(frozen=True, slots=True)
class View:
    """How one view is cut from an image: a box in its pixels, resized to a square, then changed."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False
    operations: tuple[tuple[str, float], ...] = ()
    """Name and signed strength of each, in the order they are applied."""


def draw_views(size: tuple[int, int], augment: AugmentConfig, views: int, seed: int) -> list[View]:
    """The views of an image of this height and width: a function of the arguments, and the first views do not depend on how many follow."""
    draw = random.Random(
        seed
    )  # Python promises the same numbers in every version, as numpy's and torch's generators do not
    found = []
    for _ in range(views):
        box = (0, 0, *size)
        if augment.crop_scale[0] < 1:
            box = _draw_box(*size, (augment.crop_scale[0], augment.crop_scale[1]), draw)
        mirrored = augment.flip and draw.random() < 0.5
        operations = tuple(_draw_operation(augment.magnitude, draw) for _ in range(augment.operations))
        found.append(View(*box, mirrored, operations))
    return found


def _draw_box(height: int, width: int, scale: tuple[float, float], draw: random.Random) -> tuple[int, int, int, int]:
    """Area uniform in `scale`, ratio uniform in its logarithm (torchvision's RandomResizedCrop) -> top, left, height, width."""
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw.random())
        ratio = math.exp(math.log(RATIOS[0]) + math.log(RATIOS[1] / RATIOS[0]) * draw.random())
        tall, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            return _below(height - tall, draw), _below(width - wide, draw), tall, wide
    # No such box fits a long, narrow image: the largest one in its middle.
    ratio = min(max(width / height, RATIOS[0]), RATIOS[1])
    tall, wide = max(1, min(height, round(width / ratio))), max(1, min(width, round(height * ratio)))
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _below(limit: int, draw: random.Random) -> int:
    """A number from 0 to `limit`, both among them."""
    return int(draw.random() * (limit + 1))


def _draw_operation(magnitude: int, draw: random.Random) -> tuple[str, float]:
    name = list(STRONGEST)[_below(len(STRONGEST) - 1, draw)]
    strength = STRONGEST[name] * magnitude / 10
    return name, strength if draw.random() < 0.5 else -strength
