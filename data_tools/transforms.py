"""RGB image -> uint8 tensors. Normalising happens on the device, inside the image encoder."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from data_tools.config import AugmentConfig


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
