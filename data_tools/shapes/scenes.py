"""The demo's own dataset, drawn on the spot: scenes of coloured shapes, told in five captions each (docs/shapes.md).

A `Scene` is its true attributes; the image is a function of (scene, seed), the captions of (scene, seed), and the split
a scene belongs to of the scene alone. A `Caption` knows which facts it states, so `fits` can count exactly how many
images of a collection it is true of.
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
"""Diameter as a share of the image's side: three large objects still fit side by side."""
TEXTURES = ("plain", "striped", "dotted")
COUNTS = (1, 2, 3)
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
PLACES = tuple(OPPOSITE)
RELATIONS = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}
"""How the group at a place stands to the one at the opposite place."""
SPLITS = ("train", "validation", "test")

MISSES_ALLOWED = 10_000
"""Scenes drawn in a row without a new one of the split, before a world counts as exhausted."""


@dataclass(frozen=True, order=True)
class Group:
    """`count` alike objects."""

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
    """One group at a place, or two of different kinds at opposite places: `place` is the first one's.

    'a left of b' and 'b right of a' are one scene: the groups are put in order, so that the two compare equal.
    """

    background: str
    first: Group
    place: str
    second: Group | None = None

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"no background {self.background!r}; choose from {', '.join(BACKGROUNDS)}")
        if self.place not in OPPOSITE:
            raise ValueError(f"no place {self.place!r}; choose from {', '.join(PLACES)}")
        if self.second is None:
            return
        if self.first.kind == self.second.kind:
            raise ValueError(f"both groups are {self.first.kind}s: no caption could tell them apart")
        if self.second < self.first:
            first, second = self.second, self.first
            for name, value in (("first", first), ("place", OPPOSITE[self.place]), ("second", second)):
                object.__setattr__(self, name, value)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def places(self) -> tuple[str, ...]:
        """The place of each group."""
        return (self.place, OPPOSITE[self.place])[: len(self.groups)]

    @property
    def relation(self) -> str | None:
        """How the first group stands to the second: 'left of', 'right of', 'above' or 'below'; None for one group."""
        return None if self.second is None else RELATIONS[self.place]

    def swapped(self) -> Scene:
        """The same groups, at the opposite places."""
        return replace(self, place=OPPOSITE[self.place])


@dataclass(frozen=True)
class World:
    """What scenes are made of. A small world has many near-twins, scenes that differ in one attribute or place only."""

    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    counts: tuple[int, ...] = COUNTS
    sizes: tuple[str, ...] = tuple(SIZES)
    textures: tuple[str, ...] = TEXTURES[1:]
    """Of the groups that are not plain."""
    plain_share: float = 0.5
    single_share: float = 0.15
    """Scenes of one group, where every word has only one thing to mean."""

    def __post_init__(self) -> None:
        if len(self.colours) * len(self.shapes) < 2:
            raise ValueError("a world needs two colours or two shapes: the groups of a scene differ in kind")

    def _group(self, rng: Random) -> Group:
        texture = "plain" if rng.random() < self.plain_share else rng.choice(self.textures)
        return Group(
            rng.choice(self.colours), rng.choice(self.shapes), rng.choice(self.counts), rng.choice(self.sizes), texture
        )

    def sample(self, rng: Random) -> Scene:
        """One scene, of whatever split."""
        background, first = rng.choice(tuple(BACKGROUNDS)), self._group(rng)
        if rng.random() < self.single_share:
            return Scene(background, first, rng.choice(PLACES))
        second = self._group(rng)
        while second.kind == first.kind:
            second = self._group(rng)
        return Scene(background, first, rng.choice(PLACES), second)


# --- splits -----------------------------------------------------------------------------------------------------------


def _bucket(text: str, buckets: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % buckets


def kind_held_out(kind: str) -> bool:
    """Whether a colour-shape pair ('red circle') is kept from the train split: about one in twelve."""
    return _bucket(f"kind {kind}", 12) == 0


def held_out(scene: Scene) -> bool:
    """Whether the scene shows a combination never seen in train: a held-out kind, or (one in ten) pair of kinds."""
    kinds = sorted(group.kind for group in scene.groups)
    return any(map(kind_held_out, kinds)) or (len(kinds) == 2 and _bucket("pair " + ", ".join(kinds), 10) == 0)


@lru_cache(maxsize=1 << 16)
def split_of(scene: Scene) -> str:
    """The one split a scene belongs to. It depends on the groups alone: however they are arranged, they stay together.

    Of held-out combinations half are test and half validation; of the others a tenth each, and the rest is train.
    """
    bucket = _bucket("groups " + "; ".join(str(astuple(group)) for group in scene.groups), 20)
    if held_out(scene):
        return "test" if bucket < 10 else "validation"
    return "test" if bucket < 2 else "validation" if bucket < 4 else "train"


def scenes(split: str, count: int, seed: int = 0, world: World | None = None) -> list[Scene]:
    """`count` distinct scenes of a split. A longer list of the same seed and world begins with the shorter one.

    Raises:
        ValueError: an unknown split, or a world that does not hold so many scenes of it.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; choose from {', '.join(SPLITS)}")
    world = world or World()
    rng, found, misses = Random(f"scenes {split} {seed}"), dict[Scene, None](), 0
    while len(found) < count:
        scene = world.sample(rng)
        if split_of(scene) == split and scene not in found:
            found[scene], misses = None, 0
        else:
            misses += 1
        if misses == MISSES_ALLOWED:
            raise ValueError(
                f"this world holds hardly more than {len(found)} {split} scenes; ask for fewer or widen it"
            )
    return list(found)
