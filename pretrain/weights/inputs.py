"""What a loaded model's methods accept: one or many images or texts, and one line for anything else.

Tested in tests/pretrain/weights/test_inputs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_tools.pixels.decode import open_image, upright
from runtime.errors import DataError

KINDS = "PIL images, paths, (height, width, 3) uint8 arrays, or a uint8 tensor (batch, 3, size, size)"


def read_texts(texts: Any) -> list[str]:
    """Return one string or many as a list.

    Raises:
        DataError: something in it is no string.
    """
    if isinstance(texts, str):
        return [texts]
    if not isinstance(texts, Iterable) or isinstance(texts, bytes):
        raise DataError(f"texts are a string or a list of strings, not {type(texts).__name__}")
    texts = list(texts)
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"texts are a string or a list of strings; one is {type(text).__name__}")
    return texts


def read_images(images: Any, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Return one image or many as the model reads them, (batch, 3, size, size) uint8.

    Args:
        images: one or many of PIL images, paths and (height, width, 3) uint8 arrays, or a uint8 tensor
            ((batch,) 3, size, size) that is transformed already.
        transform: turns a PIL image into (3, size, size) uint8.

    Raises:
        DataError: an image is of another kind, shape or type.
    """
    if isinstance(images, Tensor):
        if images.dtype != torch.uint8 or images.ndim not in (3, 4) or images.shape[-3] != 3:
            raise DataError(f"images are {KINDS}; this tensor is {images.dtype}, {tuple(images.shape)}")
        return images if images.ndim == 4 else images[None]
    if isinstance(images, Image.Image | str | Path) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    if not isinstance(images, Iterable) or isinstance(images, bytes):
        raise DataError(f"images are {KINDS}, not {type(images).__name__}")
    rows = [_row(image, transform) for image in images]
    if not rows:
        raise DataError("no image to encode")
    return torch.cat(rows)


def _row(image: Any, transform: Callable[[Image.Image], Tensor]) -> Tensor:
    if isinstance(image, Tensor) and image.ndim == 3:
        return read_images(image, transform)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise DataError(f"images are {KINDS}; this array is {image.dtype}, {image.shape}")
        image = Image.fromarray(image)
    elif isinstance(image, str | Path):
        try:
            image = upright(open_image(Path(image).read_bytes()))
        except (OSError, ValueError) as error:
            raise DataError(f"{image} cannot be read as an image: {error}") from error
    if not isinstance(image, Image.Image):
        raise DataError(f"images are {KINDS}; one is {type(image).__name__}")
    return transform(image)[None]
