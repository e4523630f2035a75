"""Bytes -> RGB image -> uint8 tensors. Normalising happens on the device, inside the image encoder."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import suppress

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from data_tools.config import AugmentConfig

MAX_PIXELS = 100_000_000
"""Larger images are refused by their header, before they are decoded."""


def decode_image(data: bytes) -> Image.Image:
    """Encoded bytes (JPEG, PNG, WebP) -> RGB image, upright by its EXIF orientation. Raises ValueError that says why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does no harm
            image: Image.Image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
            image.load()
            with suppress(Exception):  # broken EXIF: the image stays as it is stored
                image = ImageOps.exif_transpose(image)
            return _to_rgb(image)
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise nearly anything on broken bytes; its bomb error has no better base
        raise ValueError(re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", str(error)) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        # What is transparent shows white, as it would on a page.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class ShapeAugment(v2.RandAugment):
    """RandAugment without the operations that change hue or invert, since captions name colours (ALBEF's list)."""

    _AUGMENTATION_SPACE = {
        name: v2.RandAugment._AUGMENTATION_SPACE[name]
        for name in (
            "Identity",
            "ShearX",
            "ShearY",
            "TranslateX",
            "TranslateY",
            "Rotate",
            "Brightness",
            "Sharpness",
            "AutoContrast",
            "Equalize",
        )
    }


class TrainTransform:
    """An image -> `views` random views, a function of the seed alone."""

    def __init__(self, image_size: int, augment: AugmentConfig, views: int) -> None:
        self.views = views
        steps: list = [
            v2.RandomResizedCrop(image_size, scale=tuple(augment.crop_scale), interpolation=InterpolationMode.BICUBIC)
        ]
        if augment.crop_scale[0] == 1:
            steps = [v2.Resize((image_size, image_size), interpolation=InterpolationMode.BICUBIC)]
        if augment.flip:
            steps.append(v2.RandomHorizontalFlip())
        if augment.operations:
            steps.append(ShapeAugment(augment.operations, augment.magnitude, num_magnitude_bins=11))
        self.steps = v2.Compose([*steps, v2.PILToTensor()])

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """-> (views, 3, size, size) uint8."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` would seed the GPU's as well
            return torch.stack([self.steps(image) for _ in range(self.views)])


class EvaluationTransform:
    """The whole image, resized to a square without regard to its shape (as ALBEF scores)."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, image: Image.Image) -> Tensor:
        """-> (3, size, size) uint8."""
        size = [self.image_size, self.image_size]
        return functional.pil_to_tensor(functional.resize(image.convert("RGB"), size, InterpolationMode.BICUBIC))
