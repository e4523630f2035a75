"""A Ligature model's preprocessing for `transformers`: `AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)`.

This file is copied into every folder that `ligature export` writes for Hugging Face, and stands there alone.

Tested in tests/finetune/export/test_hugging_face.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin


class LigatureImageProcessor(BaseImageProcessor):
    """Turns images into normalised pixels.

    Args:
        image_size: Pixels a side.
        crop: None resizes the whole image to a square. A share resizes the shorter side to `image_size / crop` and cuts the square out
            of the middle.
        resample: `bicubic` or `bilinear`.
        image_mean: Mean of each colour, of values from 0 to 1.
        image_std: Deviation of each colour, likewise.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int = 224,
        crop: float | None = None,
        resample: str = "bicubic",
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.image_size, self.crop, self.resample = image_size, crop, resample
        self.image_mean, self.image_std = image_mean or [0.5] * 3, image_std or [0.5] * 3

    def preprocess(self, images: Any, **_: Any) -> BatchFeature:
        """Prepare images.

        Args:
            images: One or a list of PIL images, paths, or arrays (height, width, 3) uint8.

        Returns:
            `pixel_values`: (images, 3, size, size) float32.
        """
        images = images if isinstance(images, (list, tuple)) else [images]
        pixels = torch.from_numpy(np.stack([self.pixels(image) for image in images])).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (self.image_mean, self.image_std))
        return BatchFeature({"pixel_values": (pixels.float() - mean) / std})

    def pixels(self, image: Any) -> np.ndarray:
        """Return an image as (size, size, 3) uint8."""
        if not isinstance(image, Image.Image):
            image = Image.open(image) if isinstance(image, str) else Image.fromarray(np.asarray(image))
        image, side = _to_rgb(ImageOps.exif_transpose(image)), self.image_size
        how = Image.Resampling[self.resample.upper()]
        if self.crop is None:
            return np.array(image.resize((side, side), how))
        shorter = round(side / self.crop)
        # The longer side is cut to a whole number, as torchvision does.
        width, height = (int(shorter * edge / min(image.size)) for edge in image.size)
        image = image.resize((width, height), how)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return np.array(image.crop((left, top, left + side, top + side)))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB: 16 bits are scaled to 8, transparent parts show white."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class LigatureProcessor(ProcessorMixin):
    """The image processor and the tokenizer. Captions are cut to the tokenizer's `model_max_length` and padded to the longest."""

    if int(transformers.__version__.split(".")[0]) < 5:  # from 5 on, the names in `__init__` say it, and these warn
        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **more: Any) -> None:
        super().__init__(image_processor, tokenizer, **more)

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        padding: bool | str = True,
        truncation: bool | str = True,
        max_length: int | None = None,
        return_tensors: str = "pt",
        **_: Any,
    ) -> BatchFeature:
        """Return `pixel_values` of images, and `input_ids` and `attention_mask` of texts, whichever are given."""
        prepared: dict[str, Any] = {}
        if images is not None:
            prepared |= self.image_processor(images)
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            options = {"padding": padding, "truncation": truncation, "max_length": max_length}
            encoded = self.tokenizer(text, **options, return_tensors=return_tensors, return_token_type_ids=False)
            prepared |= {name: encoded[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature(prepared)
