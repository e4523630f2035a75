"""Scenes of coloured shapes, the worlds they are drawn from, and their splits (docs/shapes.md).

A `Scene` holds the true attributes. Its image (drawing.py) and its captions (sentences.py) are functions of (scene, seed).
The split that a scene belongs to is a function of the scene alone.

Random draws are seeded with the text of a scene, so renaming a field of `Scene` or `Group` changes every drawing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from random import Random
from typing import Any

Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 30, 35),
    "orange": (250, 140, 10),
    "yellow": (245, 225, 45),
    "green": (30, 150, 50),
    "cyan": (60, 205, 215),
    "blue": (35, 70, 220),
    "purple": (130, 40, 170),
    "pink": (250, 140, 200),
}
BACKGROUNDS: dict[str, Colour] = {"white": (245, 245, 245), "grey": (125, 125, 125), "black": (20, 20, 20)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": 0.19, "large": 0.31}
"""Diameter as a share of the image's side. Three large objects fit side by side."""
TEXTURES = ("plain", "striped", "dotted")
COUNTS = (1, 2, 3)
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
PLACES = tuple(OPPOSITE)
RELATIONS = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
"""The relation of the group at a place to the group at the opposite place."""
SPLITS = ("train", "validation", "test")

MISSES_ALLOWED = 10_000
"""Draws in a row without a new scene of the split before a world counts as exhausted."""


@dataclass(frozen=True, order=True)
class Group:
    """One to three objects that are alike."""

    colour: str
    shape: str
    count: int
    size: str
    texture: str

    def __post_init__(self) -> None:
        allowed: tuple[Collection[Any], ...] = (COLOURS, SHAPES, COUNTS, SIZES, TEXTURES)
        for (name, value), values in zip(vars(self).items(), allowed, strict=True):
            if value not in values:
                raise ValueError(f"a group's {name} cannot be {value!r}; choose from {', '.join(map(str, values))}")

    @property
    def kind(self) -> str:
        """Colour and shape, as in 'red circle'."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One group at a place, or two groups of different kinds at opposite places.

    'a left of b' and 'b right of a' are one scene. The constructor sorts the groups, so that the two compare equal.
    """

    background: str
    first: Group
    place: str
    """The first group's place."""
    second: Group | None = None

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"no background {self.background!r}; choose from {', '.join(BACKGROUNDS)}")
        if self.place not in OPPOSITE:
            raise ValueError(f"no place {self.place!r}; choose from {', '.join(PLACES)}")
        if self.second is None:
            return
        if self.first.kind == self.second.kind:
            raise ValueError(
                f"both groups are {self.first.kind}s: no caption could tell them apart; change a colour or shape"
            )
        if self.second < self.first:
            first, second = self.second, self.first
            for name, value in (("first", first), ("place", OPPOSITE[self.place]), ("second", second)):
                object.__setattr__(self, name, value)

    @property
    def groups(self) -> tuple[Group, ...]:
        """The one or two groups."""
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def places(self) -> tuple[str, ...]:
        """The place of each group."""
        return (self.place, OPPOSITE[self.place])[: len(self.groups)]

    @property
    def relation(self) -> str | None:
        """The first group is 'left of', 'right of', 'above' or 'below' the second; None for a single group."""
        return None if self.second is None else RELATIONS[self.place]

    def swapped(self) -> Scene:
        """Return the scene with its groups at the opposite places."""
        return replace(self, place=OPPOSITE[self.place])


@dataclass(frozen=True)
class World:
    """The attributes that scenes are drawn from.

    A small world has many near-twins: scenes that differ in one attribute or place only.
    """

    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    counts: tuple[int, ...] = COUNTS
    sizes: tuple[str, ...] = tuple(SIZES)
    textures: tuple[str, ...] = TEXTURES[1:]
    """Textures of the groups that are not plain."""
    plain_share: float = 0.5
    """Share of groups that are plain."""
    single_share: float = 0.15
    """Share of scenes with one group, where every word can mean only one thing."""

    def __post_init__(self) -> None:
        if len(self.colours) * len(self.shapes) < 2:
            raise ValueError("a world needs two colours or two shapes: the groups of a scene differ in kind")

    def _group(self, rng: Random) -> Group:
        texture = "plain" if rng.random() < self.plain_share else rng.choice(self.textures)
        return Group(
            rng.choice(self.colours), rng.choice(self.shapes), rng.choice(self.counts), rng.choice(self.sizes), texture
        )

    def sample(self, rng: Random) -> Scene:
        """Draw one scene, of any split."""
        background, first = rng.choice(tuple(BACKGROUNDS)), self._group(rng)
        if rng.random() < self.single_share:
            return Scene(background, first, rng.choice(PLACES))
        second = self._group(rng)
        while second.kind == first.kind:
            second = self._group(rng)
        return Scene(background, first, rng.choice(PLACES), second)


def _bucket(text: str, buckets: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % buckets


def kind_held_out(kind: str) -> bool:
    """Return whether a kind ('red circle') never occurs in the train split. About one in twelve is held out."""
    return _bucket(f"kind {kind}", 12) == 0


def held_out(scene: Scene) -> bool:
    """Return whether a scene shows a held-out kind, or a held-out pair of kinds (one pair in ten)."""
    kinds = sorted(group.kind for group in scene.groups)
    return any(map(kind_held_out, kinds)) or (len(kinds) == 2 and _bucket("pair " + ", ".join(kinds), 10) == 0)


@lru_cache(maxsize=1 << 16)
def split_of(scene: Scene) -> str:
    """Return the split a scene belongs to. It depends on the groups alone, whatever their places and background.

    Half of the held-out combinations are test and half validation. Of the others a tenth is test, a tenth validation, and
    the rest train.
    """
    bucket = _bucket("groups " + "; ".join(str(astuple(group)) for group in scene.groups), 20)
    if held_out(scene):
        return "test" if bucket < 10 else "validation"
    return "test" if bucket < 2 else "validation" if bucket < 4 else "train"


def scenes(split: str, count: int, seed: int = 0, world: World | None = None) -> list[Scene]:
    """Return `count` distinct scenes of a split. A longer list of the same seed and world begins with the shorter one.

    Raises:
        ValueError: The split is unknown, or the world does not hold that many scenes of it.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; choose from {', '.join(SPLITS)}")
    world = world or World()
    rng, distinct, misses = Random(f"scenes {split} {seed}"), dict[Scene, None](), 0
    while len(distinct) < count:
        scene = world.sample(rng)
        if split_of(scene) == split and scene not in distinct:
            distinct[scene], misses = None, 0
        else:
            misses += 1
        if misses == MISSES_ALLOWED:
            raise ValueError(
                f"this world holds hardly more than {len(distinct)} {split} scenes; ask for fewer or widen it"
            )
    return list(distinct)
