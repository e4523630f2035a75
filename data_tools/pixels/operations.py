"""RandAugment's operations, on Pillow images and on batches of tensors alike.

Tested in tests/data_tools/pixels/test_views.py.
"""

from __future__ import annotations

import math
from typing import Any

from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional


def apply_operation(image: Any, name: str, strength: float) -> Any:
    """Return an image after one operation.

    Args:
        image: RGB (Pillow), or (…, 3, size, size) uint8.
        name: One of `STRONGEST` in views.py.
        strength: Signed, in the operation's own unit (see `STRONGEST`).
    """
    if name in ("shear_x", "shear_y"):
        # torchvision takes a shear as an angle, where RandAugment states a slope.
        degrees = math.degrees(math.atan(strength))
        shear = [degrees, 0.0] if name == "shear_x" else [0.0, degrees]
        return functional.affine(image, 0.0, [0, 0], 1.0, shear, InterpolationMode.NEAREST, center=[0, 0])
    if name in ("translate_x", "translate_y"):
        height, width = functional.get_size(image)
        shift = [int(strength * width), 0] if name == "translate_x" else [0, int(strength * height)]
        return functional.affine(image, 0.0, shift, 1.0, [0.0, 0.0], InterpolationMode.NEAREST)
    if name == "rotate":
        return functional.rotate(image, strength, InterpolationMode.NEAREST)
    if name == "brightness":
        return functional.adjust_brightness(image, 1 + strength)
    if name == "sharpness":
        return functional.adjust_sharpness(image, 1 + strength)
    if name == "auto_contrast":
        return functional.autocontrast(image)
    if name == "equalize":
        return functional.equalize(image)
    assert name == "identity", name
    return image
