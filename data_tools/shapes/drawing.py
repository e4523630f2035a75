"""Draw a scene as an image. The pixels are a function of (scene, size, seed)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from random import Random

from PIL import Image, ImageChops, ImageDraw

from data_tools.shapes.scenes import BACKGROUNDS, COLOURS, SIZES, Colour, Scene

OVERSAMPLING = 4
"""Pixels drawn per pixel of the image, along each side."""


def _polygon(shape: str, side: float) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(side / 2, 0), (side, side), (0, side)]
    if shape == "cross":
        a, b = side / 3, side * 2 / 3
        arms = [(a, 0), (b, 0), (b, a), (side, a), (side, b), (b, b)]
        return arms + [(side - x, side - y) for x, y in arms]
    angles = [(math.pi * step / 5, side * (0.56 if step % 2 == 0 else 0.24)) for step in range(10)]
    return [(side / 2 + radius * math.sin(angle), side / 2 - radius * math.cos(angle)) for angle, radius in angles]


@lru_cache(maxsize=2048)
def _mask(shape: str, texture: str, side: int) -> Image.Image:
    """Return where an object of `side` pixels covers its background. Stripes and dots are cut out."""
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    box = (0, 0, side - 1, side - 1)
    if shape in ("circle", "ring"):
        pen.ellipse(box, fill=255)
        if shape == "ring":
            pen.ellipse((side * 0.27, side * 0.27, side * 0.73, side * 0.73), fill=0)
    elif shape == "square":
        pen.rectangle((side * 0.05, side * 0.05, side * 0.95, side * 0.95), fill=255)
    else:
        pen.polygon(_polygon(shape, side - 1), fill=255)
    holes = Image.new("L", (side, side), 255)
    pen, pitch = ImageDraw.Draw(holes), side / 4
    if texture == "striped":
        for row in range(4):
            pen.rectangle((0, (row + 0.6) * pitch, side, (row + 1) * pitch), fill=0)
    elif texture == "dotted":
        for row in range(4):
            for column in range(4):
                x, y = (column + 0.5) * pitch, (row + 0.5) * pitch
                pen.ellipse((x - pitch * 0.27, y - pitch * 0.27, x + pitch * 0.27, y + pitch * 0.27), fill=0)
    return ImageChops.multiply(mask, holes)


def _centres(count: int, along: int, middle: float, rng: Random) -> Iterator[tuple[float, float]]:
    """Yield the centres, in shares of the side, of objects in a line along axis 0 (x) or 1 (y).

    The line lies at `middle` of the other axis. Its own centre stays near the image's, so that 'left of' is never also
    'above'.
    """
    start = rng.uniform(-0.1, 0.1) if count == 1 else 0.0
    for index in range(count):
        point = (0.5 + start + (index - (count - 1) / 2) * (0.33 if count == 3 else 0.4) + rng.uniform(-0.01, 0.01),
                 middle + rng.uniform(-0.07, 0.07))  # fmt: skip
        yield point if along == 0 else point[::-1]


def draw(scene: Scene, size: int = 64, seed: int = 0) -> Image.Image:
    """Draw a scene as an RGB image of `size` pixels a side. Positions, diameters and tones vary with the seed."""
    rng = Random(f"image {seed} {scene}")
    side = size * OVERSAMPLING
    canvas = Image.new("RGB", (side, side), _vary(BACKGROUNDS[scene.background], rng))
    along = 1 if scene.place in ("left", "right") else 0
    for group, place in zip(scene.groups, scene.places, strict=True):
        middle = 0.25 if place in ("left", "top") else 0.75
        colour, diameter = _vary(COLOURS[group.colour], rng), round(side * SIZES[group.size] * rng.uniform(0.92, 1.06))
        mask = _mask(group.shape, group.texture, diameter)
        for x, y in _centres(group.count, along, middle, rng):
            canvas.paste(colour, (round(x * side - diameter / 2), round(y * side - diameter / 2)), mask)
    return canvas.reduce(OVERSAMPLING)


def _vary(colour: Colour, rng: Random) -> Colour:
    red, green, blue = (min(255, max(0, channel + rng.randint(-10, 10))) for channel in colour)
    return red, green, blue
