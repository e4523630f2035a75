"""Captions of scenes: sentences in varied words, the facts they state, and which scenes they fit.

A `Caption` knows its facts, so `fits` counts exactly how many images of a collection it is true of.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import permutations
from random import Random
from typing import Any

from data_tools.shapes.scenes import OPPOSITE, RELATIONS, Scene, World, scenes

OMISSION_SHARE = 0.25
"""Share of captions that leave something out, as people do."""

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
"""The words for each value; a value not listed has only its own name. A repeated word is drawn more often."""
SIDES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
WITH_TEXTURE = {"striped": " with stripes", "dotted": " with dots"}
WITH_SIDE = {"left": "on {its} left", "right": "on {its} right", "top": "above {it}", "bottom": "below {it}"}


@dataclass(frozen=True)
class Caption:
    """A sentence and the facts it states.

    'a left of b' states that a is on the left and b on the right.
    """

    text: str
    groups: tuple[dict[str, Any], ...]
    """The stated attributes of each group that the sentence names, with `place` if it is stated."""
    background: str | None = None


CaptionedScene = tuple[Scene, Caption]


def fits(caption: Caption, scene: Scene) -> bool:
    """Return whether everything a caption states is true of a scene. The scene may hold more."""
    if caption.background not in (None, scene.background):
        return False
    facts = [vars(group) | {"place": place} for group, place in zip(scene.groups, scene.places, strict=True)]
    return any(
        all(stated.items() <= truth.items() for stated, truth in zip(caption.groups, arrangement, strict=True))
        for arrangement in permutations(facts, len(caption.groups))
    )


def _word(value: Any, rng: Random) -> str:
    """Draw a word for a value."""
    return rng.choice(WORDS.get(value, (value,)))


def _plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def _noun_phrase(stated: dict[str, Any], rng: Random) -> str:
    """Return a phrase for a group, such as 'two large striped red circles' or 'a small blue square with dots'."""
    texture, tail = stated.get("texture"), ""
    if texture in WITH_TEXTURE and rng.random() < 0.3:
        tail = WITH_TEXTURE[texture]
        texture = None
    words = [
        _word(value, rng) for value in (stated.get("size"), texture, stated.get("colour"), stated["shape"]) if value
    ]
    if stated["count"] > 1:
        words[-1] = _plural(words[-1])
    count = _word(stated["count"], rng)
    return " ".join(["an" if count == "a" and words[0][0] in "aeio" else count, *words]) + tail


def _sentence(stated: list[dict[str, Any]], rng: Random) -> str:
    """Return a clause about one or two groups, with their places where the facts hold them."""
    phrases, place = [_noun_phrase(facts, rng) for facts in stated], stated[0].get("place")
    a, is_are = phrases[0], "is" if stated[0]["count"] == 1 else "are"
    if len(stated) == 1:
        here = f" {SIDES[place]}" if place else ""
        return rng.choice((f"{a}{here}", f"{a}{here}", f"there {is_are} {a}{here}", f"a picture of {a}{here}"))
    b = phrases[1]
    if place is None:
        return rng.choice((f"{a} and {b}", f"{a} next to {b}", f"there {is_are} {a} and {b}", f"{a} with {b}"))
    relation, here, there = _word(RELATIONS[place], rng), SIDES[place], SIDES[OPPOSITE[place]]
    its, it = ("its", "it") if stated[1]["count"] == 1 else ("their", "them")
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
    stated = _facts(scene)
    if rng.random() < 0.5:
        stated.reverse()
    for facts in stated:
        if facts["texture"] == "plain" and rng.random() < 0.75:  # people seldom mention that something is plain
            del facts["texture"]
    if rng.random() < OMISSION_SHARE:
        omitted = rng.choice(("size", "colour", "texture", "place", "group"))
        if omitted == "group":
            del stated[1:]
        else:
            for facts in stated if omitted == "place" else [rng.choice(stated)]:
                facts.pop(omitted, None)
    text = _sentence(stated, rng)
    background = scene.background if rng.random() < 0.5 else None
    if background:
        text += rng.choice((" on a {} background", " on {}", " against a {} background")).format(background)
    return Caption(text, tuple(stated), background)


def describe(scene: Scene, seed: int = 0, n: int = 5) -> list[Caption]:
    """Return `n` captions of a scene with the facts they state."""
    return [_caption(scene, Random(f"caption {seed} {index} {scene}")) for index in range(n)]


def captions(scene: Scene, seed: int = 0, n: int = 5) -> list[str]:
    """Return `n` captions of a scene in varied words, in lower case."""
    return [caption.text for caption in describe(scene, seed, n)]


def relation_pairs(
    count: int, seed: int = 0, split: str = "test", world: World | None = None
) -> list[tuple[CaptionedScene, CaptionedScene]]:
    """Return pairs of captioned scenes that differ only in which group is where.

    The two captions consist of the same words: 'a red circle left of a blue square', 'a blue square left of a red
    circle'. A bag of words therefore scores 50 %.
    """
    rng, pairs = Random(f"relation pairs {seed}"), []
    of_two = replace(world or World(), single_share=0.0)
    for scene in scenes(split, count, seed, of_two):
        stated = _facts(scene)
        first, second = (_noun_phrase(facts, rng) for facts in stated)
        here, there = SIDES[scene.place], SIDES[OPPOSITE[scene.place]]
        frame = rng.choice(("{} " + _word(RELATIONS[scene.place], rng) + " {}", "{} " + f"{here} and {{}} {there}"))
        after = [facts | {"place": place} for facts, place in zip(stated[::-1], scene.places, strict=True)]
        pairs.append((
            (scene, Caption(frame.format(first, second), tuple(stated))),
            (scene.swapped(), Caption(frame.format(second, first), tuple(after))),
        ))  # fmt: skip
    return pairs
