"""RGB pixels -> uint8 tensors. Normalising happens on the device, inside the image encoder."""

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
    """An image -> `views` random views, a function of the seed alone."""

    def __init__(self, image_size: int, augment: AugmentConfig, views: int) -> None:
        self.image_size, self.augment, self.views = image_size, augment, views

    def __call__(self, pixels: np.ndarray, seed: int) -> Tensor | PackedImages:
        """pixels: (height, width, 3) uint8 -> (views, 3, size, size) uint8, or what the device will make them of."""
        views = draw_views((pixels.shape[0], pixels.shape[1]), self.augment, self.views, seed)
        if self.augment.where == "device":
            return PackedImages.of(pixels, views, self.image_size)
        return torch.stack([render(pixels, view, self.image_size) for view in views])


def render(pixels: np.ndarray, view: View, size: int) -> Tensor:
    """One view on the CPU: (height, width, 3) uint8 -> (3, size, size) uint8.

    torch's uint8 kernel is Pillow's antialiased bicubic in integers (Pillow-SIMD), several times as fast; it wants the
    colours of a pixel side by side, as they come from the decoder.
    """
    box = pixels[view.top : view.top + view.height, view.left : view.left + view.width]
    crop = torch.from_numpy(np.ascontiguousarray(box)).permute(2, 0, 1)[None]
    seen = torch.nn.functional.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
    if view.mirrored:
        seen = seen.flip(-1)
    operations = [(name, strength) for name, strength in view.operations if name != "identity"]
    if operations:  # Pillow's are two to six times as fast as torch's on a CPU
        image = Image.fromarray(seen.permute(1, 2, 0).contiguous().numpy())
        for name, strength in operations:
            image = apply_operation(image, name, strength)
        seen = functional.pil_to_tensor(image)
    return seen


class EvaluationTransform:
    """The whole image, resized to a square without regard to its shape (as ALBEF scores)."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, image: Image.Image) -> Tensor:
        """-> (3, size, size) uint8. An image of another mode than RGB, or on its side, becomes what decoding would make of it."""
        size = [self.image_size, self.image_size]
        return functional.pil_to_tensor(functional.resize(upright(image), size, InterpolationMode.BICUBIC))
