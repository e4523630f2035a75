"""Encoded bytes -> RGB images. Nothing of torch, so sharding and reading agree on what an image is.

Whatever reads an image passes through here. Only listed formats are opened: Pillow knows some whose decoding starts
another program (EPS runs Ghostscript). Bytes and pixels are counted before anything is decoded.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from PIL import ExifTags, Image

if TYPE_CHECKING:
    import numpy as np

MAX_PIXELS = 100_000_000
"""Larger images are refused by their header, before they are decoded."""
MAX_BYTES = 100_000_000
"""Longer members are refused before they are read."""
SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
"""What shards hold (an MPO is a JPEG, of which the first picture counts)."""
SOURCE_FORMATS = (*SHARD_FORMATS, "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""What `ligature shard` takes in; the last five become JPEG."""


def decode_image(data: bytes) -> Image.Image:
    """Encoded bytes of a shard -> RGB image, upright, of an animation the first frame. Raises ValueError that says why."""
    return upright(open_image(data))


def open_image(data: bytes, formats: tuple[str, ...] = SHARD_FORMATS, least: int | None = None) -> Image.Image:
    """Encoded bytes -> the image as stored, decoded whole: in its own mode, not turned by its EXIF orientation, `format` set.
    Where pixels need not be exact, `least` lets a JPEG come at a half, quarter or eighth of its size, no side below it.
    Raises ValueError that says why."""
    with _in_words():
        image = _read_header(data, formats)
        if least is not None:
            image.draft(None, (least, least))
        image.load()
        return image


def read_size(data: bytes) -> tuple[int, int]:
    """(width, height) as stored, by the header alone: the rest may still be broken. Raises ValueError that says why."""
    with _in_words():
        return _read_header(data, SHARD_FORMATS).size


def decode_pixels(data: bytes) -> np.ndarray:
    """`decode_image` for training: (height, width, 3) uint8, to the bit the same pixels, in two thirds of the time.

    simplejpeg and Pillow decode a JPEG with one and the same library (libjpeg-turbo, exact DCT, smooth chroma), but Pillow's
    pixels have to be copied out of its own layout. What simplejpeg would not take without a warning is left to Pillow.
    """
    import numpy as np

    if (quick := _decode_plain_jpeg(data)) is not None:
        return quick
    with _in_words():
        image = _read_header(data, SHARD_FORMATS)
        pixels = _decode_jpeg(data, image) if image.format == "JPEG" and image.mode in ("RGB", "L") else None
        if pixels is None:
            image.load()
            return np.array(upright(image))
        turn = _turn(image)
        return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def _decode_plain_jpeg(data: bytes) -> np.ndarray | None:
    """A JPEG in ordinary colours without EXIF or XMP, as sharding writes them: nothing of it needs Pillow's look."""
    import simplejpeg

    if len(data) > MAX_BYTES or not data.startswith(b"\xff\xd8\xff") or b"\xff\xe1" in data:
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
            return None
        return simplejpeg.decode_jpeg(data)
    except ValueError:
        return None


def _decode_jpeg(data: bytes, header: Image.Image) -> np.ndarray | None:
    import simplejpeg

    try:
        pixels = simplejpeg.decode_jpeg(data)
    except ValueError:
        return None
    return pixels if pixels.shape == (header.height, header.width, 3) else None


def _read_header(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    if len(data) > MAX_BYTES:
        raise ValueError(f"{len(data):,} bytes are more than {MAX_BYTES:,}")
    image: Image.Image = Image.open(io.BytesIO(data), formats=formats)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS:,}")
    return image


@contextmanager
def _in_words() -> Iterator[None]:
    """Whatever a decoder raises becomes a ValueError whose words are the same every time."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata does no harm
            yield
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # Pillow's decoders raise nearly anything on broken bytes; its bomb error has no better base
        raise ValueError(re.sub(r" <\S+ object at 0x[0-9a-f]+>", "", str(error)) or type(error).__name__) from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""


def _turn(image: Image.Image) -> Image.Transpose | None:
    with suppress(Exception):  # broken EXIF: the image stays as it is stored
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def upright(image: Image.Image) -> Image.Image:
    """Any image -> RGB, turned as its EXIF orientation says, without metadata (which would turn it again)."""
    turn = _turn(image)
    image = to_rgb(image if turn is None else image.transpose(turn))
    image.info = {}
    return image


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


def data_url(image: Image.Image, longest: int | None = None) -> str:
    """A picture within an HTML page: JPEG in base64, made smaller where its longer side is over `longest` pixels."""
    if longest:
        image = image.copy()
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    room = io.BytesIO()
    image.convert("RGB").save(room, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(room.getvalue()).decode()}"
