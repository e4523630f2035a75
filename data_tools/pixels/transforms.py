"""Turn RGB pixels into uint8 tensors. The image encoder normalises them, on the device."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from data_tools.config import AugmentConfig
from data_tools.pixels.decode import upright
from data_tools.pixels.operations import apply_operation
from data_tools.pixels.packed import PackedImages
from data_tools.pixels.views import View, draw_views


class TrainTransform:
    """Turns an image into random views, which are a function of the image and the seed."""

    def __init__(self, image_size: int, augment: AugmentConfig, views: int) -> None:
        self.image_size, self.augment, self.views = image_size, augment, views

    def __call__(self, pixels: np.ndarray, seed: int) -> Tensor | PackedImages:
        """Draw and make the views of an image.

        Args:
            pixels: (height, width, 3) uint8.
            seed: Decides the draws.

        Returns:
            (views, 3, size, size) uint8, or the packed image that the device makes the views from.
        """
        views = draw_views((pixels.shape[0], pixels.shape[1]), self.augment, self.views, seed)
        if self.augment.where == "device":
            return PackedImages.of(pixels, views, self.image_size)
        return torch.stack([render(pixels, view, self.image_size) for view in views])


def render(pixels: np.ndarray, view: View, size: int) -> Tensor:
    """Make one view on the CPU.

    torch's uint8 kernel is Pillow's antialiased bicubic in integers (Pillow-SIMD), several times as fast. It needs the
    colours of a pixel side by side, as the decoder returns them.

    Args:
        pixels: (height, width, 3) uint8.
        view: What to cut and how to change it.
        size: Pixels a side of the result.

    Returns:
        (3, size, size) uint8.
    """
    box = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
    crop = torch.from_numpy(np.ascontiguousarray(box)).permute(2, 0, 1)[None]
    result = torch.nn.functional.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
    if view.mirrored:
        result = result.flip(-1)
    operations = [(name, strength) for name, strength in view.operations if name != "identity"]
    if operations:
        # On a CPU, Pillow's operations are two to six times as fast as torch's.
        image = Image.fromarray(result.permute(1, 2, 0).contiguous().numpy())
        for name, strength in operations:
            image = apply_operation(image, name, strength)
        result = functional.pil_to_tensor(image)
    return result


class EvaluationTransform:
    """Makes an image ready for scoring.

    Args:
        image_size: Pixels a side of the result.
        crop: None resizes the whole image to a square, whatever its shape, as ALBEF does. A share resizes the shorter side to
            `image_size / crop` and cuts the square out of the middle, as most published image models do.
        resample: `bicubic` or `bilinear`.
    """

    def __init__(self, image_size: int, crop: float | None = None, resample: str = "bicubic") -> None:
        self.image_size, self.crop = image_size, crop
        self.resample = InterpolationMode(resample)

    def __call__(self, image: Image.Image) -> Tensor:
        """Return (3, size, size) uint8. An image that is not RGB or not upright is converted as decoding would."""
        size = [self.image_size, self.image_size]
        image = upright(image)
        if self.crop is None:
            return functional.pil_to_tensor(functional.resize(image, size, self.resample))
        shorter = functional.resize(image, [round(self.image_size / self.crop)], self.resample)
        return functional.pil_to_tensor(functional.center_crop(shorter, size))
