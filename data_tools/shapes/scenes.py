"""The demo's own dataset, drawn on the spot: scenes of coloured shapes, told in five captions each (docs/shapes.md).

A `Scene` is its true attributes; the image is a function of (scene, seed), the captions of (scene, seed), and the split
a scene belongs to of the scene alone. A `Caption` knows which facts it states, so `fits` can count exactly how many
images of a collection it is true of.
"""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass, replace
from functools import lru_cache, partial
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageChops, ImageDraw

from runtime.errors import DataError
from runtime.files import committed_folder, write_json
from runtime.progress import progress

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
OMISSION_SHARE = 0.25
"""Captions that leave something out, as people do."""

WORDS: dict[Any, tuple[str, ...]] = {
    1: ("a", "a", "one", "a single"),
    2: ("two", "two", "a pair of"),
    3: ("three", "three", "a trio of"),
    "small": ("small", "little", "tiny"),
    "large": ("large", "big"),
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "spotted"),
    "purple": ("purple", "violet"),
    "cyan": ("cyan", "turquoise"),
    "circle": ("circle", "disc"),
    "cross": ("cross", "plus sign"),
    "ring": ("ring", "hoop"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "beneath", "lower than"),
}
"""Each value's ways to say it; a value not listed has its own name only."""
SIDES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
WITH_TEXTURE = {"striped": " with stripes", "dotted": " with dots"}
WITH_SIDE = {"left": "on {its} left", "right": "on {its} right", "top": "above {it}", "bottom": "below {it}"}


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


# --- captions ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Caption:
    """A sentence and the facts it states: of each group it names, some of its attributes and `place`; the background.

    'a left of b' states that of the two, a is on the left and b on the right.
    """

    text: str
    groups: tuple[dict[str, Any], ...]
    background: str | None = None


Told = tuple[Scene, Caption]


def fits(caption: Caption, scene: Scene) -> bool:
    """Whether everything the caption states is true of the scene (which may hold more than it tells)."""
    if caption.background not in (None, scene.background):
        return False
    facts = [vars(group) | {"place": place} for group, place in zip(scene.groups, scene.places, strict=True)]
    return any(
        all(said.items() <= truth.items() for said, truth in zip(caption.groups, arrangement, strict=True))
        for arrangement in permutations(facts, len(caption.groups))
    )


def _say(value: Any, rng: Random) -> str:
    return rng.choice(WORDS.get(value, (value,)))


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _noun_phrase(said: dict[str, Any], rng: Random) -> str:
    """'two large striped red circles', 'a small blue square with dots'."""
    texture, tail = said.get("texture"), ""
    if texture in WITH_TEXTURE and rng.random() < 0.3:
        tail = WITH_TEXTURE[texture]
        texture = None
    words = [_say(value, rng) for value in (said.get("size"), texture, said.get("colour"), said["shape"]) if value]
    if said["count"] > 1:
        words[-1] = _plural(words[-1])
    count = _say(said["count"], rng)
    return " ".join(["an" if count == "a" and words[0][0] in "aeio" else count, *words]) + tail


def _sentence(said: list[dict[str, Any]], rng: Random) -> str:
    """One or two groups as a clause, with their places if told."""
    phrases, place = [_noun_phrase(facts, rng) for facts in said], said[0].get("place")
    a, is_are = phrases[0], "is" if said[0]["count"] == 1 else "are"
    if len(said) == 1:
        here = f" {SIDES[place]}" if place else ""
        return rng.choice((f"{a}{here}", f"{a}{here}", f"there {is_are} {a}{here}", f"a picture of {a}{here}"))
    b = phrases[1]
    if place is None:
        return rng.choice((f"{a} and {b}", f"{a} next to {b}", f"there {is_are} {a} and {b}", f"{a} with {b}"))
    relation, here, there = _say(RELATIONS[place], rng), SIDES[place], SIDES[OPPOSITE[place]]
    its, it = ("its", "it") if said[1]["count"] == 1 else ("their", "them")
    return rng.choice((
        f"{a} {relation} {b}",
        f"{a} {relation} {b}",
        f"{a} {is_are} {relation} {b}",
        f"there {is_are} {a} {relation} {b}",
        f"{b}, with {a} {WITH_SIDE[place].format(its=its, it=it)}",
        f"{a} {here} and {b} {there}",
        f"{a} {here}, {b} {there}",
        f"{here} {a}, {there} {b}",
    ))  # fmt: skip


def _facts(scene: Scene) -> list[dict[str, Any]]:
    return [asdict(group) | {"place": place} for group, place in zip(scene.groups, scene.places, strict=True)]


def _caption(scene: Scene, rng: Random) -> Caption:
    said = _facts(scene)
    if rng.random() < 0.5:
        said.reverse()
    for facts in said:
        if facts["texture"] == "plain" and rng.random() < 0.75:  # what is plain is seldom called so
            del facts["texture"]
    if rng.random() < OMISSION_SHARE:
        omitted = rng.choice(("size", "colour", "texture", "place", "group"))
        if omitted == "group":
            del said[1:]
        else:
            for facts in said if omitted == "place" else [rng.choice(said)]:
                facts.pop(omitted, None)
    text = _sentence(said, rng)
    background = scene.background if rng.random() < 0.5 else None
    if background:
        text += rng.choice((" on a {} background", " on {}", " against a {} background")).format(background)
    return Caption(text, tuple(said), background)


def describe(scene: Scene, seed: int = 0, n: int = 5) -> list[Caption]:
    """`n` captions with the facts they state."""
    return [_caption(scene, Random(f"caption {seed} {index} {scene}")) for index in range(n)]


def captions(scene: Scene, seed: int = 0, n: int = 5) -> list[str]:
    """`n` captions in varied words, lower case."""
    return [caption.text for caption in describe(scene, seed, n)]


def relation_pairs(
    count: int, seed: int = 0, split: str = "test", world: World | None = None
) -> list[tuple[Told, Told]]:
    """Pairs of scenes that differ only in which group stands where, with one caption each.

    The two captions are made of the same words ('a red circle left of a blue square', 'a blue square left of a red
    circle'): a bag of words scores 50 %.
    """
    rng, pairs = Random(f"relation pairs {seed}"), []
    of_two = replace(world or World(), single_share=0.0)
    for scene in scenes(split, count, seed, of_two):
        said = _facts(scene)
        first, second = (_noun_phrase(facts, rng) for facts in said)
        here, there = SIDES[scene.place], SIDES[OPPOSITE[scene.place]]
        frame = rng.choice(("{} " + _say(RELATIONS[scene.place], rng) + " {}", "{} " + f"{here} and {{}} {there}"))
        after = [facts | {"place": place} for facts, place in zip(said[::-1], scene.places, strict=True)]
        pairs.append((
            (scene, Caption(frame.format(first, second), tuple(said))),
            (scene.swapped(), Caption(frame.format(second, first), tuple(after))),
        ))  # fmt: skip
    return pairs


# --- images -----------------------------------------------------------------------------------------------------------

OVERSAMPLING = 4


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
    """Where an object of `side` pixels covers what is behind it; textures are cut out."""
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
    """Centres (shares of the side) of objects in a line along axis 0 (x) or 1 (y), at `middle` of the other axis.

    The line's centre keeps near the image's, so that 'left of' is never 'above' as well.
    """
    start = rng.uniform(-0.1, 0.1) if count == 1 else 0.0
    for index in range(count):
        point = (0.5 + start + (index - (count - 1) / 2) * (0.33 if count == 3 else 0.4) + rng.uniform(-0.01, 0.01),
                 middle + rng.uniform(-0.07, 0.07))  # fmt: skip
        yield point if along == 0 else point[::-1]


def draw(scene: Scene, size: int = 64, seed: int = 0) -> Image.Image:
    """The scene as an RGB image of `size` x `size` pixels; positions, diameters and tones vary with the seed."""
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


# --- a source that `ligature shard` reads -----------------------------------------------------------------------------


def _save(folder: Path, size: int, item: tuple[str, Scene, int]) -> None:
    file_name, scene, seed = item
    draw(scene, size, seed).save(folder / file_name)


def write_source(
    folder: Path,
    counts: dict[str, int],
    size: int = 64,
    seed: int = 0,
    workers: int = 1,
    world: World | None = None,
) -> None:
    """Draw a dataset: `images/*.png`, COCO's `captions_<split>.json` for each split, and `scenes.jsonl` with the truth.

    `counts` gives the images of each split. A line of `scenes.jsonl` holds an image's id, file name, split, scene,
    whether its combination is held out, and the facts its captions state. The files do not depend on `workers`.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder} exists already; remove it or choose another folder")
    with committed_folder(folder) as temporary:
        (temporary / "images").mkdir()
        drawings, lines = list[tuple[str, Scene, int]](), list[str]()
        for split, count in counts.items():
            images, annotations = [], []
            for index, scene in enumerate(scenes(split, count, seed, world)):
                identifier, file_name = len(drawings), f"{split}_{index:06d}.png"
                told = describe(scene, seed)
                drawings.append((file_name, scene, seed))
                image = {"id": identifier, "file_name": file_name}
                images.append(image | {"width": size, "height": size})
                annotations += [
                    {"id": 5 * identifier + number, "image_id": identifier, "caption": caption.text}
                    for number, caption in enumerate(told)
                ]
                truth = image | {"split": split, "held_out": held_out(scene)}
                truth |= {"scene": asdict(scene), "relation": scene.relation}
                lines.append(json.dumps(truth | {"captions": [asdict(caption) for caption in told]}) + "\n")
            write_json(temporary / f"captions_{split}.json", {"images": images, "annotations": annotations})
        (temporary / "scenes.jsonl").write_text("".join(lines), encoding="utf-8")
        # spawn, not fork: the caller may hold threads
        several = multiprocessing.get_context("spawn").Pool(workers) if workers > 1 else nullcontext()
        with several as pool, progress("drawing", len(drawings), "images") as bar:
            save = partial(_save, temporary / "images", size)
            for _ in pool.imap_unordered(save, drawings, 64) if pool else map(save, drawings):
                bar.advance()
