"""Any image becomes RGB, upright; any view is a function of its seed; broken or monstrous images are refused in words."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.config import AugmentConfig
from data_tools.images import MAX_PIXELS, decode_image
from data_tools.transforms import EvaluationTransform, TrainTransform

ORIENTATION = 0x0112
RED, GREEN = (255, 0, 0), (0, 255, 0)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (24, 18), seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def pixel(data: bytes, place: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = decode_image(data)
    assert image.mode == "RGB"
    return image.getpixel(place)


FORMATS = [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("WEBP", "RGB"), ("WEBP", "RGBA")] + [
    ("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1")
]


@pytest.mark.parametrize(("form", "mode"), FORMATS, ids=[" ".join(one) for one in FORMATS])
def test_every_kind_of_image_comes_out_rgb_in_its_size(form, mode):
    image = decode_image(encoded(noise(mode), form))
    assert (image.mode, image.size) == ("RGB", (24, 18))


def test_lossless_pixels_are_kept_to_the_bit():
    for form, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(decode_image(encoded(noise(), form, **options)), noise())


def test_cmyk_colours_are_not_inverted():
    red, green, blue = pixel(encoded(Image.new("RGB", (8, 8), RED).convert("CMYK"), "JPEG", quality=95))
    assert red > 200 and green < 60 and blue < 60


def test_sixteen_bits_a_pixel_keep_their_shades():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    shades = np.asarray(decode_image(encoded(Image.fromarray(ramp))))[0, :, 0].astype(int)
    assert np.abs(shades - np.arange(256)).max() <= 1


def test_what_is_transparent_shows_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert pixel(encoded(image)) == (255, 255, 255)
    assert pixel(encoded(image), (1, 0)) == RED


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_colour_declared_transparent_shows_white(mode):
    if mode == "P":
        image = Image.new("P", (2, 1), 1)
        image.putpalette([*RED, *GREEN])
        image.putpixel((1, 0), 0)
        transparent, kept = 1, RED
    else:
        transparent, kept = (7, 9) if mode == "L" else (GREEN, RED)
        image = Image.new(mode, (2, 1), transparent)
        image.putpixel((1, 0), kept)
        kept = (9, 9, 9) if mode == "L" else kept
    data = encoded(image, transparency=transparent)
    assert pixel(data) == (255, 255, 255)
    assert pixel(data, (1, 0)) == kept


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_images_stand_upright_by_their_exif_orientation(form):
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # turned a quarter: what is stored to the left is shown on top
    stored = Image.new("RGB", (64, 32), GREEN)
    stored.paste(RED, (0, 0, 32, 32))
    shown = decode_image(encoded(stored, form, exif=exif))
    assert shown.size == (32, 64)
    assert shown.getpixel((16, 8))[0] > 200 and shown.getpixel((16, 56))[1] > 200


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.filterwarnings("error")
def test_broken_exif_does_not_lose_the_image(form, exif):
    assert decode_image(encoded(noise(), form, exif=exif)).size == (24, 18)


def header_of(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds next to none."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        chunk(b"IDAT", zlib.compress(b"\0")),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_001, 12_000, 60_000, 2**31 - 1])
@pytest.mark.filterwarnings("error")
def test_a_monstrous_image_is_refused_by_its_header(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="pixels"):
        decode_image(header_of(side, side))
    assert side * side > MAX_PIXELS


@pytest.mark.parametrize(
    "data", [b"", b"no image", encoded(noise(), "JPEG")[:200], encoded(noise(), "GIF"), encoded(noise(), "TIFF")]
)
def test_what_is_no_image_of_ours_is_refused_in_words_that_are_always_the_same(data):
    said = set()
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            decode_image(bytes(data))
        said.add(str(error.value))
    assert len(said) == 1 and "0x" not in said.pop()


def test_damaged_bytes_raise_nothing_else():
    """Whatever a decoder does with them: the stream knows one error."""
    rng = random.Random(0)
    whole = [encoded(noise(), "JPEG"), encoded(noise()), encoded(noise(), "WEBP"), encoded(noise("P"), transparency=3)]
    refused = 0
    for turn in range(600):
        data = bytearray(whole[turn % len(whole)])
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(rng.choice([60, len(data)]))] = rng.randrange(256)
        try:
            decode_image(bytes(data))
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.fixture(params=[{}, {"operations": 0}, {"flip": False, "crop_scale": [1.0, 1.0]}], ids=str)
def transform(request):
    return TrainTransform(16, AugmentConfig(**request.param), views=2)


def test_views_are_a_function_of_the_seed(transform):
    first = transform(noise(), 5)
    torch.rand(3)
    assert torch.equal(first, transform(noise(), 5))
    assert first.shape == (2, 3, 16, 16) and first.dtype == torch.uint8


def test_other_seeds_give_other_views(transform):
    assert len({transform(noise(), seed).numpy().tobytes() for seed in range(8)}) > 4


def test_the_two_views_of_an_image_differ():
    one, other = TrainTransform(16, AugmentConfig(), views=2)(noise(), 5)
    assert not torch.equal(one, other)


def test_the_first_view_does_not_depend_on_how_many_there_are():
    one = TrainTransform(16, AugmentConfig(), views=1)(noise(), 5)
    assert torch.equal(one[0], TrainTransform(16, AugmentConfig(), views=2)(noise(), 5)[0])


def test_no_global_generator_is_touched(transform, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPU's generator was seeded"))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    transform(noise(), 5)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_without_flips_left_stays_left():
    image = Image.new("RGB", (32, 32), GREEN)
    image.paste(RED, (0, 0, 16, 32))
    views = TrainTransform(16, AugmentConfig(flip=False, operations=0, crop_scale=[1, 1]), views=8)(image, 0)
    assert (views[:, 0, 8, 2] > 200).all() and (views[:, 1, 8, 13] > 200).all()


def test_with_flips_about_half_are_mirrored():
    image = Image.new("RGB", (32, 32), GREEN)
    image.paste(RED, (0, 0, 16, 32))
    views = TrainTransform(16, AugmentConfig(operations=0, crop_scale=[1, 1]), views=64)(image, 0)
    assert 16 < (views[:, 1, 8, 2] > 200).sum() < 48


def test_operations_leave_colours_alone():
    """A red image stays red: captions name colours."""
    for seed in range(40):
        views = TrainTransform(16, AugmentConfig(operations=3, magnitude=10), views=1)(
            Image.new("RGB", (32, 32), RED), seed
        )
        covered = views[0, 0] > 20  # what a shift or a turn uncovers is black
        assert (views[0, 1][covered] < 60).all() and (views[0, 2][covered] < 60).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (300, 2)])
def test_odd_shapes_become_squares(size, transform):
    assert transform(noise(size=size), 3).shape == (2, 3, 16, 16)
    assert EvaluationTransform(16)(noise(size=size)).shape == (3, 16, 16)


def test_evaluation_sees_the_whole_image():
    image = Image.new("RGB", (64, 16), GREEN)
    image.paste(RED, (0, 0, 32, 16))
    seen = EvaluationTransform(16)(image)
    assert seen.dtype == torch.uint8
    assert (seen[0, :, :7] > 240).all() and (seen[1, :, 9:] > 240).all()


def test_evaluation_takes_images_of_other_modes():
    assert EvaluationTransform(16)(noise("L")).shape == (3, 16, 16)
