"""Decode encoded bytes to RGB images, without torch.

Everything that reads an image comes through here, so sharding and reading agree on what an image is. Only listed formats
are opened, because Pillow decodes some by starting another program (EPS runs Ghostscript). Bytes and pixels are counted
before anything is decoded.
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
"""Pixels of the largest image. Larger ones are refused by their header, before they are decoded."""
MAX_BYTES = 100_000_000
"""Bytes of the longest encoded image. Longer ones are refused before they are read."""
SHARD_FORMATS = ("JPEG", "PNG", "WEBP")
"""Formats in shards. An MPO is a JPEG of which the first picture counts."""
SOURCE_FORMATS = (*SHARD_FORMATS, "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""Formats that `ligature shard` accepts; the last five become JPEG."""


def decode_image(data: bytes) -> Image.Image:
    """Decode an image of a shard to upright RGB; of an animation, the first frame.

    Raises:
        ValueError: The bytes cannot be decoded; the message says why.
    """
    return upright(open_image(data))


def open_image(data: bytes, formats: tuple[str, ...] = SHARD_FORMATS, least: int | None = None) -> Image.Image:
    """Decode an image whole, as it is stored: in its own mode, not turned by its EXIF orientation, `format` set.

    Args:
        data: Encoded bytes.
        formats: Names of the formats to accept.
        least: Where pixels need not be exact, decode a JPEG at a half, quarter or eighth of its size, with no side
            below this many pixels.

    Raises:
        ValueError: The bytes cannot be decoded; the message says why.
    """
    with _decoding_errors():
        image = _read_header(data, formats)
        if least is not None:
            image.draft(None, (least, least))
        image.load()
        return image


def read_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) in pixels as stored, from the header alone. The rest may still be broken.

    Raises:
        ValueError: The header cannot be read; the message says why.
    """
    with _decoding_errors():
        return _read_header(data, SHARD_FORMATS).size


def decode_pixels(data: bytes) -> np.ndarray:
    """Decode an image for training: the pixels of `decode_image`, bit for bit, in two thirds of the time.

    simplejpeg and Pillow decode a JPEG with the same library (libjpeg-turbo, exact DCT, smooth chroma). Pillow's pixels
    must then be copied out of its own layout. Pillow decodes whatever simplejpeg would not accept without a warning.

    Returns:
        (height, width, 3) uint8.

    Raises:
        ValueError: The bytes cannot be decoded; the message says why.
    """
    import numpy as np  # imported here for start-up time

    if (plain := _decode_plain_jpeg(data)) is not None:
        return plain
    with _decoding_errors():
        image = _read_header(data, SHARD_FORMATS)
        pixels = _decode_jpeg(data, image) if image.format == "JPEG" and image.mode in ("RGB", "L") else None
        if pixels is None:
            image.load()
            return np.array(upright(image))
        turn = _turn_of(image)
        return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))


def _decode_plain_jpeg(data: bytes) -> np.ndarray | None:
    """Decode a JPEG in ordinary colours without EXIF or XMP, as sharding writes them. Other bytes give None."""
    import simplejpeg

    # FF E1 marks EXIF and XMP, which may turn the image. Found by chance in other bytes, it only costs time.
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
def _decoding_errors() -> Iterator[None]:
    """Turn whatever a decoder raises into a ValueError with the same message every time."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata is harmless
            yield
    # The machine is at fault, not the bytes, so this must not count as a broken image.
    except MemoryError:
        raise
    except Exception as error:
        # Pillow's decoders raise almost anything on broken bytes, and its decompression-bomb error has no better base.
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
"""EXIF orientation -> the transposition that turns the image upright."""


def _turn_of(image: Image.Image) -> Image.Transpose | None:
    with suppress(Exception):  # with broken EXIF, the image stays as it is stored
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    return None


def upright(image: Image.Image) -> Image.Image:
    """Return an image as RGB, turned by its EXIF orientation, without metadata (which would turn it again)."""
    turn = _turn_of(image)
    image = to_rgb(image if turn is None else image.transpose(turn))
    image.info = {}
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode as RGB: 16 bits are scaled to 8, transparent parts show white."""
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip to 255
        # 65,535 / 257 is 255. In this mode Pillow takes no function but a scale and an offset.
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        # Transparent parts show white, as on a page.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def data_url(image: Image.Image, longest: int | None = None) -> str:
    """Return an image as a data URL for an HTML page: a JPEG in base64.

    Args:
        image: Any image.
        longest: Pixels of the longer side at most; None keeps the size.
    """
    if longest:
        image = image.copy()
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
