"""Any supported image becomes upright RGB by every decoder, and broken, huge or dangerous ones are refused."""

from __future__ import annotations

import io
import random
import struct
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_tools.making.shard_file import Encoding
from data_tools.pixels import decode as module
from data_tools.pixels.decode import MAX_PIXELS, SOURCE_FORMATS, decode_image, decode_pixels, open_image, upright

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
    data = encoded(noise(mode), form)
    image = decode_image(data)
    assert (image.mode, image.size) == ("RGB", (24, 18))
    assert np.array_equal(decode_pixels(data), image)


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


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    assert pixel(encoded(image)) == (255, 255, 255)
    assert pixel(encoded(image), (1, 0)) == RED


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_colour_declared_transparent_becomes_white(mode):
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
    assert np.array_equal(upright(shown), shown), "turned once, not twice"


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_what_pillow_makes_of_it(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(noise(), "JPEG", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode_image(data), shown)
    assert np.array_equal(decode_pixels(data), shown)


def test_an_orientation_may_be_stored_in_xmp():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(noise(), "JPEG", xmp=xmp)
    assert decode_image(data).size == (18, 24) and decode_pixels(data).shape == (24, 18, 3)


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
def test_an_animation_gives_its_first_frame(form):
    frames = [noise(seed=seed) for seed in range(3)]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], lossless=True, duration=10)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.array_equal(decode_image(data), frames[0])
    assert np.array_equal(decode_pixels(data), frames[0])


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"keep_rgb": True}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_progressive_and_plain_jpegs_give_the_same_picture_by_both_decoders(mode, options):
    if mode != "RGB":
        options = {}
    smooth = noise(mode).resize((61, 47), Image.Resampling.BICUBIC)  # sides that no block divides
    plain, progressive = (encoded(smooth, "JPEG", progressive=progressive, **options) for progressive in (False, True))
    assert np.array_equal(decode_image(plain), decode_image(progressive))
    for data in (plain, progressive):
        assert np.array_equal(decode_pixels(data), decode_image(data))


def test_jpegs_of_the_web_give_the_same_pixels_by_both_decoders(shared_data):
    with tarfile.open(shared_data / "data" / "cc12m_test" / "cc12m-train-0000.tar") as tar:
        photos = [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    assert len(photos) == 32
    for data in photos:
        assert np.array_equal(decode_pixels(data), decode_image(data))


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
def test_a_huge_image_is_refused_by_its_header(side, monkeypatch):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="pixels"):
        decode_image(header_of(side, side))
    assert side * side > MAX_PIXELS


@pytest.mark.parametrize(
    "data", [b"", b"no image", encoded(noise(), "JPEG")[:200], encoded(noise(), "GIF"), encoded(noise(), "TIFF")]
)
def test_unsupported_files_are_refused_with_a_constant_message(data):
    messages = set()
    for _ in range(2):
        with pytest.raises(ValueError) as error:
            decode_image(bytes(data))
        messages.add(str(error.value))
    assert len(messages) == 1 and "0x" not in messages.pop()


@pytest.mark.parametrize("kind", range(5), ids=["jpeg", "progressive", "png", "webp", "palette"])
def test_damaged_bytes_raise_only_our_error_and_both_decoders_agree(kind):
    """Whatever a decoder does with them: the stream knows one error."""
    photo = noise(size=(60, 44)).resize((64, 48), Image.Resampling.BICUBIC)
    whole = [
        lambda: encoded(photo, "JPEG"),
        lambda: encoded(photo, "JPEG", progressive=True),
        lambda: encoded(photo),
        lambda: encoded(photo, "WEBP"),
        lambda: encoded(noise("P"), transparency=3),
    ][kind]()
    rng, refused = random.Random(kind), 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(rng.choice([60, len(data)]))] = rng.randrange(256)
        try:
            pixels = np.asarray(decode_image(bytes(data)))
        except ValueError as error:
            refused += 1
            with pytest.raises(ValueError) as other:
                decode_pixels(bytes(data))
            assert str(other.value) == str(error)
        else:
            assert np.array_equal(decode_pixels(bytes(data)), pixels)
    assert refused > 20


def test_a_jpeg_that_is_cut_short_is_refused_by_both_decoders():
    data = encoded(noise(size=(64, 48)), "JPEG")
    for end in (2, 300, len(data) // 2, len(data) - 40):
        for decode in (decode_image, decode_pixels):
            with pytest.raises(ValueError):
                decode(data[:end])


def test_too_many_bytes_are_refused_before_decoding(monkeypatch):
    data = encoded(noise())
    monkeypatch.setattr(module, "MAX_BYTES", len(data))
    decode_image(data)
    monkeypatch.setattr(module, "MAX_BYTES", len(data) - 1)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    for read in (decode_image, decode_pixels, Encoding().apply):
        with pytest.raises(ValueError, match="bytes are more than"):
            read(data)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%touch /tmp/owned) (w) file\n%%EOF\n"


def test_no_other_program_is_started_to_draw_an_image(monkeypatch):
    """Pillow hands EPS to Ghostscript, a language with files and pipes."""
    Image.init()
    assert "EPS" in Image.ID and Image.open(io.BytesIO(EPS)).format == "EPS", "Pillow would take it"
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    for read in (decode_image, decode_pixels, Encoding().apply):
        with pytest.raises(ValueError, match="cannot identify"):
            read(EPS)


@pytest.mark.parametrize("form", SOURCE_FORMATS)
def test_sharding_takes_these_formats_as_they_are_stored(form):
    image = open_image(encoded(noise(), form), SOURCE_FORMATS)
    assert (image.format, image.size) == (form, (24, 18))
    assert Image.open(io.BytesIO(Encoding(9).apply(encoded(noise(), form))[0])).size == (12, 9)
