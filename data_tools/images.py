"""Encoded bytes -> RGB images. Nothing of torch, so sharding and reading agree on what an image is."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import suppress

from PIL import Image, ImageOps

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
            return to_rgb(image)
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise nearly anything on broken bytes; its bomb error has no better base
        raise ValueError(re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", str(error)) or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: 16 bits scaled to 8, what is transparent on white."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip to 255
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        # What is transparent shows white, as it would on a page.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
